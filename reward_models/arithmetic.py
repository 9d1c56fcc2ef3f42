"""The reward of the arithmetic recipes. Copy this file and change what you like."""


def correct(responses: list[str], answer: list[str] | list[int]) -> list[float]:
    """1.0 for a response that is the answer and nothing else; blanks around it do not count."""
    return [float(response.strip() == str(gold)) for response, gold in zip(responses, answer, strict=True)]
