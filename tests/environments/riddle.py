"""Environments of gymnasium that the tests play."""

import gymnasium


class Riddle(gymnasium.Env):
    """Texts in both directions; a wrong answer is answered by a number that it draws."""

    observation_space = gymnasium.spaces.Text(100)
    action_space = gymnasium.spaces.Text(3, charset="abc")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return f"Which word? {self.np_random.integers(10**9)}", {}

    def step(self, action):
        right = action == "cab"
        return str(self.np_random.integers(10**9)), float(right), right, False, {}


gymnasium.register("Riddle-v0", Riddle)
gymnasium.register("Drive-v0", lambda: gymnasium.make("Pendulum-v1").unwrapped)
