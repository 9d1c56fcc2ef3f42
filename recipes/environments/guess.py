"""The environment of the guessing recipes: a number is to be found, and each guess is answered. Copy and change it."""

import re

import llmrl


class Guess(llmrl.Environment):
    """Holds the number in the row's column `secret`; answers "higher" or "lower" until it is guessed.

    Args:
        highest: The number is from 1 to this one.
    """

    def __init__(self, highest: int = 15) -> None:
        self.low, self.high = 1, highest

    def start(self, row):
        self.secret = int(row["secret"])
        return f"Which number from {self.low} to {self.high}?"

    def respond(self, message):
        found = re.fullmatch(r"\d{1,3}", message.text.strip())
        if found is None:
            return llmrl.Turn("a number", reward=-0.2)
        guess = int(found[0])
        if guess == self.secret:
            return llmrl.Turn(done=True, reward=1.0)
        reward = -0.02 if self.low <= guess <= self.high else -0.2  # it may forget what was answered before
        if guess < self.secret:
            self.low = max(self.low, guess + 1)
            return llmrl.Turn("higher", reward=reward)
        self.high = min(self.high, guess - 1)
        return llmrl.Turn("lower", reward=reward)
