"""lm-eval against a real server: local tasks, and likelihoods that are the model's own."""

import json

import jax
import numpy as np
import pytest

from dsv3_jax.data.tokenizer import encode
from dsv3_jax.inference.server.scoring import Scorer

DOCUMENTS = [
    {"text": "def", "choices": [" naïve", "(x):", "é漢字"], "label": 0},
    {"text": "# déjà", "choices": [" vu", "return", "x"], "label": 1},
]


@pytest.fixture
def harness(monkeypatch, tmp_path):
    """lm-eval and a task of these documents; nothing is fetched from anywhere."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    file = tmp_path / "documents.jsonl"
    file.write_text("\n".join(map(json.dumps, DOCUMENTS)))

    def evaluate(address: str, **task) -> dict:
        of_data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
        return evaluator.simple_evaluate(
            model="local-completions",
            model_args={"model": "small", "base_url": f"{address}/v1/completions", "max_length": 128, "max_retries": 1},
            tasks=[{"task": "local", **of_data, "doc_to_text": "{{text}}", "target_delimiter": "", **task}],
            task_manager=TaskManager(include_defaults=False),  # reading thousands of them takes longer than all else
            bootstrap_iters=0,
            verbosity="ERROR",
        )

    return evaluate


def test_choices_get_the_models_own_likelihoods(harness, address, service, model, tokenizer):
    service.score = Scorer(model, tokenizer)
    target = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}"}
    made = harness(address, **target, metric_list=[{"metric": "acc"}])

    def likelihood(text: str, choice: str) -> float:
        prompt, ids = encode(tokenizer, text), encode(tokenizer, text + choice)
        tokens_S = np.zeros(32, np.int32)  # one shape to compile; causality keeps the padding from the rest
        tokens_S[: len(ids)] = ids
        logprobs_SW = np.asarray(jax.nn.log_softmax(model(tokens_S[None])[0, :, : tokenizer.get_vocab_size()], axis=-1))
        return sum(logprobs_SW[position - 1, ids[position]].item() for position in range(len(prompt), len(ids)))

    for sample in made["samples"]["local"]:
        document = sample["doc"]
        expected = [likelihood(document["text"], choice) for choice in document["choices"]]
        found = [float(response[0]) for response in sample["filtered_resps"]]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert made["results"]["local"]["sample_len"] == len(DOCUMENTS)


def test_texts_are_generated_up_to_their_end(harness, address, engine):
    until = {"until": ["字"], "max_gen_toks": 50, "do_sample": False}
    task = {"output_type": "generate_until", "doc_to_target": "naïve 漢", "generation_kwargs": until}
    made = harness(address, **task, metric_list=[{"metric": "exact_match"}])
    assert made["results"]["local"]["exact_match,none"] == 1.0
    assert {request.sampling.temperature for request in engine.requests} == {0.0}
