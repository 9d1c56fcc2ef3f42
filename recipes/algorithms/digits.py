"""A reward that random weights can learn at once: the share of digits among the characters of a response."""


def digits(responses):
    return [sum(character.isdigit() for character in response) / max(len(response), 1) for response in responses]
