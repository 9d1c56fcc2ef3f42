"""A reward on another scale than `digits`: minus one point for each character of a response."""


def brevity(responses):
    return [-float(len(response)) for response in responses]
