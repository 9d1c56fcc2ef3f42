from llmrl.environments.hosting import Host
from llmrl.environments.loading import Code
from llmrl.environments.processes import Processes
from llmrl.environments.threads import Threads


def test_both_hosts_play_the_role():
    code = Code("guess.py:Guess", {}, ())
    assert isinstance(Threads(code, timeout_s=1.0), Host)
    assert isinstance(Processes(code, timeout_s=1.0, tell=print), Host)
    assert not isinstance(code, Host)
