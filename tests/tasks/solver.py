"""What a document asks, worked out anew from its text: nothing here knows the generators."""

import re


def solve(prompt: str) -> str:
    """The answer, worked out anew from the prompt's text alone."""
    context, *_, question = prompt.split("\nAnswer:")
    sentences = [sentence + "." for sentence in context.removeprefix("Facts:").split(".")]
    if counted := re.fullmatch(r" Note (\w+) makes", question):
        return f" {sentences.count(f' Note {counted[1]}.'):02d}."
    if question.startswith((" The", " Note")):
        told = [s.removeprefix(question)[:-1] for s in sentences if s.startswith(question + " ")]
        assert told
        return " then".join(told) + "."
    if question.startswith(" Let"):
        return _solve_variables(sentences, question)
    return _solve_trace(sentences, question)


def _solve_variables(sentences: list[str], question: str) -> str:
    values = dict(m.groups() for s in sentences if (m := re.fullmatch(r" Let (\w+) be (\w+)\.", s)))
    name = re.fullmatch(r" Let (\w+) be", question)[1]
    answer = ""
    while True:
        value = values[name]
        answer += f" {value}"
        if value.isdigit():
            return answer + "."
        name = value
        answer += f" Let {name} be"


def _solve_trace(sentences: list[str], question: str) -> str:
    steps = {}
    for sentence in sentences:
        if found := re.fullmatch(r" At (\w+) (.+) then (\w+)\.", sentence):
            assert found[1] not in steps
            steps[found[1]] = (found[2], found[3])
    node, registers, answer = question.removeprefix(" At "), {"": 0}, ""
    while node != "end":
        operation, after = steps[node]
        *register, verb, operand = operation.split()
        register = register[0] if register else ""
        if verb == "add":
            registers[register] = (registers[register] + int(operand)) % 100
        elif verb == "set":
            registers[register] = int(operand)
        else:
            assert verb == "take"
            registers[register] = registers[operand]
            operation += f" {registers[operand]:02d}"
        named = f"{register} " if register else ""
        answer += f" At {node} {operation} then {after} makes {named}{registers[register]:02d}"
        node = after
    return answer.removeprefix(question) + "."
