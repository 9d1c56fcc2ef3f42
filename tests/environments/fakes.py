"""A host without processes, and what else conversations need, in milliseconds."""

from llmrl.data.rendering import Rendering
from llmrl.environments.calls import ToolCall
from llmrl.environments.environment import Turn
from llmrl.environments.hosting import Failure, ToolResult

FORGOTTEN = "abcdefghi"
FORGETS = (
    "{%- for message in messages -%}{%- if message.role == 'assistant' -%}"
    f"<{{% for letter in message.content if letter not in '{FORGOTTEN}' %}}{{{{ letter }}}}{{% endfor %}}"
    "{{ eos_token }}"
    "{%- else -%}>{{ message.content }}{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}<{%- endif -%}"
)
"""A chat template that leaves out some letters of what the assistant has said."""


class ScriptedHost:
    """`Host` of environments that are functions: ``start(row)``, ``respond(number, message)``, ``close(number)``."""

    def __init__(self, *, start=lambda row: None, respond=lambda number, message: Turn(done=True), close=None):
        self.code = {}
        self.start, self.answer, self.end_reward = start, respond, close or (lambda number: 0.0)
        self.answers, self.asked, self.num_ends, self.seeds = {}, [], 0, {}

    def load(self):
        pass

    def open(self, number, row, *, opening_seed, seed):
        self.seeds[number] = (opening_seed, seed)
        self.answers[number] = self.start(row)

    def respond(self, number, message):
        self.asked.append((number, message))
        self.answers[number] = self.answer(number, message)

    def call(self, number, calls):
        self.asked.append((number, calls))
        self.answers[number] = [ToolResult(f"{call.name}!", call.name == "bad") for call in calls]
        failing = [call for call in calls if call.name == "breaks"]
        if failing:
            self.answers[number] = Failure("breaks", "raised KeyError: 'x'")

    def close(self, number):
        self.answers[number] = self.end_reward(number)

    def wait(self, numbers, look):
        look()
        return {number: self.answers.pop(number) for number in numbers}

    def end(self):
        self.num_ends += 1
        self.answers.clear()


class Spelled(Rendering):
    """Each character is its code, and nothing stands around an observation."""

    def __init__(self):
        pass

    def opening(self, prompt):
        return [ord(c) for c in prompt]

    def as_written(self, turn, text):
        return {**turn, "content": text}

    def between(self, messages, observation, *, last_id):
        text = observation if isinstance(observation, str) else "".join(each["content"] for each in observation)
        return [ord(c) for c in text]


def read_turn(ids):
    """The text of a turn whose last id is its end; words in brackets are calls."""
    text = "".join(chr(i) for i in ids if i > 5)
    calls = [ToolCall(word[1:-1]) for word in text.split() if word[0] == "["]
    return text, text, calls
