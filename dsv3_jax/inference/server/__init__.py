"""A model behind OpenAI's interface over HTTP: `python infer.py --checkpoint=DIR --serve`.

serving.py    from the command line to a server that runs, and its clean end
app.py        the routes, who may use them, how errors are answered
completions.py, chat_completions.py    one route each: from its request to its reply
protocol.py, fields.py    requests, read and checked
streams.py    the engine's events, which come from its thread, as texts
replies.py    texts as one reply or as a stream of server-sent events
token_texts.py, scoring.py    log probabilities: their shapes, and those of a prompt
metrics.py    /metrics, in Prometheus' format
page/         a chat in the browser, at /
"""
