"""Bytes that a compiled program moves between a chip and its main memory.

Every instruction reads its operands and writes its result, unless they are in fast memory; what a fusion computes on
the way never reaches memory. Where only a part of an array is read or overwritten, as a scan does with its stacks, only
the part counts. A kernel is taken to read every operand once: what it reads again is not seen here.
"""

from dsv3_jax.plan.hlo import Instruction, Program, bytes_of, called_by, slow_bytes_of

FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency"}
CONTROL = {"while", "conditional", "call", "call-start", "async-start"}
READ_IN_PART = {"dynamic-slice", "slice", "gather"}
# What is written over a part of the first operand, by the number of the operand that is.
OVERWRITES = {"dynamic-update-slice": 1, "scatter": 2}
PASSED_ON = {"bitcast", "copy", "convert", "reshape"}


def memory_traffic(program: Program) -> float:
    """Bytes in one run of the program on one device. A loop of unknown length counts once, and so does each branch."""
    total = 0.0
    for computation in outside_of_fusions(program):
        instructions = program.computations[computation]
        total += program.executions[computation] * sum(_moved(each, program) for each in instructions)
    return total


def outside_of_fusions(program: Program) -> set[str]:
    """The entry and what its loops, branches and calls run, one after the other."""
    found, waiting = {"ENTRY"}, ["ENTRY"]
    while waiting:
        for instruction in program.computations[waiting.pop()]:
            if instruction.opcode in CONTROL:
                new = set(called_by(instruction)) - found
                found |= new
                waiting += new
    return found


def _moved(instruction: Instruction, program: Program) -> float:
    opcode = instruction.opcode
    if opcode in FREE or opcode in CONTROL or opcode.endswith("-start"):
        return 0.0
    if opcode.endswith("-done"):  # a copy, or a collective, that other work overlaps: read there, written here
        return bytes_of(instruction.result) + slow_bytes_of(instruction.result)
    if opcode == "fusion":
        return _moved_by_fusion(instruction, program)
    if opcode in READ_IN_PART:
        return 2 * slow_bytes_of(instruction.result)
    types = [program.types[instruction.computation, name] for name in instruction.operands]
    if opcode in OVERWRITES:
        return 2 * slow_bytes_of(types[OVERWRITES[opcode]])
    return slow_bytes_of(instruction.result) + sum(map(slow_bytes_of, types))


def _moved_by_fusion(fusion: Instruction, program: Program) -> float:
    inside = called_by(fusion)[0]
    read = 0.0
    for parameter in program.computations[inside]:
        if parameter.opcode == "parameter":
            operand = fusion.operands[place_of(parameter)]
            if slow_bytes_of(program.types[fusion.computation, operand]):
                read += min(bytes_of(parameter.result), _read_of(parameter, program))
    return read + (_written(inside, program) if slow_bytes_of(fusion.result) else 0.0)


def place_of(parameter: Instruction) -> int:
    """Which of the operands it is."""
    return int(parameter.rest.partition(")")[0])


def _read_of(array: Instruction, program: Program) -> float:
    """Bytes of an array that the other instructions of its computation, inside a fusion, read."""
    read = 0.0
    for user in program.users[array.computation, array.name]:
        if user.opcode in READ_IN_PART:
            read += bytes_of(user.result)
        elif user.opcode in PASSED_ON:
            # An array converted as a whole before a part of it is taken is still only read in that part.
            read += _read_of(user, program)
        elif user.opcode == "fusion":
            for parameter in program.computations[called_by(user)[0]]:
                if parameter.opcode == "parameter" and user.operands[place_of(parameter)] == array.name:
                    read += _read_of(parameter, program)
        elif user.opcode not in OVERWRITES or user.operands[0] != array.name:
            return bytes_of(array.result)
    return read


def _written(computation: str, program: Program) -> float:
    """Bytes that a fusion running this computation writes."""
    by_name = {each.name: each for each in program.computations[computation]}

    def of(instruction: Instruction) -> float:
        while instruction.opcode in PASSED_ON and instruction.operands[0] in by_name:
            instruction = by_name[instruction.operands[0]]
        if instruction.opcode == "fusion":
            return _written(called_by(instruction)[0], program)
        if instruction.opcode in OVERWRITES:
            return bytes_of(by_name[instruction.operands[OVERWRITES[instruction.opcode]]].result)
        return bytes_of(instruction.result)

    root = program.computations[computation][-1]
    return sum(of(by_name[name]) for name in root.operands) if root.opcode == "tuple" else of(root)
