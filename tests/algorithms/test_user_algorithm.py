"""Classes of users: what equals ours gives our numbers, and whatever is wrong is named."""

import re
from dataclasses import replace

import pytest
import torch

from llmrl.algorithms.config import GRPOConfig
from llmrl.algorithms.grpo import GRPO
from llmrl.algorithms.user_algorithm import check_user_algorithm, load_algorithm, make_user_algorithm
from llmrl.functional.losses import token_weights
from llmrl.functional.statistics import Maximum, Mean, Moments, Total
from llmrl.metrics import Metrics
from llmrl.reports.progress import Silent
from llmrl.user_code import UserCodeError, UserCodeFailure

from .test_grpo import LIMIT, FixedPolicy, make_rollout, make_scores, random_logprobs

CLASSES = """
from dataclasses import dataclass, replace

import torch

from llmrl.algorithms.grpo import GRPO
from llmrl.batches import Experience
from llmrl.functional.statistics import Mean
from llmrl.metrics import Metrics
from llmrl.roles import Algorithm


class Same(GRPO):
    pass

class Empty(Algorithm):
    pass

class Alone:
    def experience(self, rollout, scores): ...
    def losses(self, batch, weights): ...

class Narrow(GRPO):
    def __init__(self, config, actor):
        pass

class Bare(Algorithm):
    def __init__(self, config, *, actor, reference, max_response_tokens):
        self.aggregation = config.aggregation
    def experience(self, rollout, scores): ...
    def losses(self, batch, weights): ...

class Fails(GRPO):
    def __init__(self, config, **roles):
        raise ValueError("no such config")

class Averages(GRPO):
    def __init__(self, config, **roles):
        super().__init__(config, **roles)
        self.aggregation = "mean"

class Endless(GRPO):
    def __init__(self, config, **roles):
        super().__init__(config, **roles)
        self.max_redraws = None


# --- experience

class Raises(GRPO):
    def experience(self, rollout, scores):
        return rollout.sequences.no_such_thing

class Alone2(GRPO):
    def experience(self, rollout, scores):
        return super().experience(rollout, scores)[0]

class PlainMetrics(GRPO):
    def experience(self, rollout, scores):
        return super().experience(rollout, scores)[0], {}

class NumberMetric(GRPO):
    def experience(self, rollout, scores):
        return super().experience(rollout, scores)[0], Metrics({"policy/x": 1.0})

class Changed(GRPO):
    def change(self, experience):
        raise NotImplementedError
    def experience(self, rollout, scores):
        experience, metrics = super().experience(rollout, scores)
        return replace(experience, **self.change(experience)), metrics

class PerResponse(Changed):
    def change(self, experience):
        return {"advantages": experience.advantages[:, 0]}

class Shorter(Changed):
    def change(self, experience):
        return {"advantages": experience.advantages[1:]}

class NotFinite(Changed):
    def change(self, experience):
        return {"advantages": experience.advantages.index_fill(0, torch.tensor(1), torch.nan)}

class NotFiniteOffTheMask(Changed):
    def change(self, experience):
        return {"advantages": experience.advantages.where(experience.counted, torch.nan)}

class Unsampled(Changed):
    def change(self, experience):
        return {"rollout": experience.scores}

class Torn(GRPO):
    def experience(self, rollout, scores):
        experience, metrics = super().experience(rollout, scores)
        return experience.select(torch.arange(5)), metrics

class OneGroup(GRPO):
    def experience(self, rollout, scores):
        experience, metrics = super().experience(rollout, scores)
        return experience.select(torch.arange(3)), metrics

@dataclass(frozen=True, kw_only=True)
class Weighted(Experience):
    weight: object

class OneWeight(GRPO):
    weight = 0.5
    def experience(self, rollout, scores):
        e, metrics = super().experience(rollout, scores)
        parts = {"rollout": rollout, "scores": scores, "old_logprobs": e.old_logprobs, "advantages": e.advantages}
        return Weighted(**parts, weight=self.weight), metrics

class Weights(OneWeight):
    weight = {"a": torch.ones(6), "b": torch.ones(6, 2)}

class FewWeights(OneWeight):
    weight = {"a": torch.ones(6), "b": torch.ones(2)}


# --- losses

class Returns(GRPO):
    def losses(self, batch, weights):
        return "actor", weights.sum(), Metrics()

class Nothing(GRPO):
    def losses(self, batch, weights):
        pass

class RaisesLater(GRPO):
    def losses(self, batch, weights):
        yield from super().losses(batch, weights)
        raise KeyError("late")

class Item(GRPO):
    def item(self, loss, batch):
        raise NotImplementedError
    def losses(self, batch, weights):
        yield self.item((weights * self.actor.logprobs(batch.sequences).logprobs.nan_to_num()).sum(), batch)

class Pair(Item):
    def item(self, loss, batch):
        return "actor", loss

class Critic(Item):
    def item(self, loss, batch):
        return "critic", loss, Metrics()

class PerToken(Item):
    def item(self, loss, batch):
        return "actor", loss.expand(3), Metrics()

class Detached(Item):
    def item(self, loss, batch):
        return "actor", loss.detach(), Metrics()

class Infinite(Item):
    def item(self, loss, batch):
        return "actor", loss / 0.0, Metrics()

class TokenMetric(Item):
    def item(self, loss, batch):
        return "actor", loss, Metrics({"policy/x": Mean(batch.advantages, 1.0)})

class Taken(Item):
    name = None
    def item(self, loss, batch):
        return "actor", loss, Metrics({self.name: Mean(1.0, 1.0)})

class Mixed(GRPO):  # a metric of one name from each method
    kinds = {}
    def metrics(self, method):
        return Metrics({"policy/x": self.kinds[method](*[1.0] * len(self.kinds[method]._fields))})
    def experience(self, rollout, scores):
        return super().experience(rollout, scores)[0], self.metrics("experience")
    def losses(self, batch, weights):
        for module, loss, _ in super().losses(batch, weights):
            yield module, loss, self.metrics("losses")
        if "losses again" in self.kinds:
            yield module, loss, self.metrics("losses again")
    def finish(self, experience):
        return self.metrics("finish")


# --- the rest

class Undecided(GRPO):
    def should_stop(self, update):
        return torch.ones(2)

class Unfinished(GRPO):
    def finish(self, experience):
        pass

class Stateless(GRPO):
    def state_dict(self):
        pass

class StateOfObjects(GRPO):
    def state_dict(self):
        return {"seen": {"groups": [{1, 2}]}}

class StateOfNumbers(GRPO):
    def state_dict(self):
        return {1: 2.0}

class Forgetful(GRPO):
    def load_state_dict(self, state):
        self.total = state["total"]
"""


@pytest.fixture(autouse=True)
def _file(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "classes.py").write_text(CLASSES)


@pytest.fixture
def messages():
    return []


@pytest.fixture
def make(messages):
    """Makes a class of the file, with the actor of `random_logprobs`."""

    class Listed(Silent):
        def message(self, text):
            messages.append(text)

    def make(name, **settings):
        return make_user_algorithm(
            f"classes.py:{name}",
            GRPOConfig(group_size=3, **settings),
            progress=Listed(),
            actor=FixedPolicy(random_logprobs(0).requires_grad_()),
            reference=None,
            max_response_tokens=LIMIT,
        )

    return make


def ours(**settings):
    actor = FixedPolicy(random_logprobs(0).requires_grad_())
    return GRPO(GRPOConfig(group_size=3, **settings), actor=actor, reference=None, max_response_tokens=LIMIT)


def experience_of(algorithm):
    with torch.no_grad():
        return algorithm.experience(make_rollout(), make_scores())


def losses_of(algorithm, experience):
    mask = experience.counted
    weights = token_weights(mask, aggregation="token", num_tokens=17, num_responses=6, max_response_tokens=LIMIT)
    return list(algorithm.losses(experience, weights))


# --- loading and making -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("classes.py:Empty", "lacks experience, losses; write them, or make it a subclass of llmrl.roles.Algorithm"),
        ("classes.py:Alone", "lacks should_stop, finish, state_dict, load_state_dict; write them"),
        ("classes.py:Narrow", r"takes \(config, actor\) and is called with \(config, \*, actor, reference, max_resp"),
        ("builtins:max", r"is <built-in function max> \(builtin_function_or_method\); name a class, such as a subc"),
    ],
)
def test_a_class_that_cannot_be_used_is_refused_with_the_way_out(name, told):
    with pytest.raises(UserCodeError, match=rf"^algorithm\.name {re.escape(name)} {told}"):
        load_algorithm(name)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "Bare",
            "has no max_redraws, max_response_tokens, which the loop reads; set them in __init__, such as self.max_",
        ),
        ("Fails", r"raised ValueError: no such config at /.*/classes\.py:35$"),
        ("Averages", "has aggregation 'mean'; expected token or sequence or constant; set self.aggregation = config"),
        ("Endless", "has max_redraws None; expected a whole number; set it in __init__$"),
    ],
)
def test_a_class_that_cannot_be_made_is_named(make, name, told):
    with pytest.raises(UserCodeFailure, match=rf"^algorithm\.name classes\.py:{name} {told}"):
        make(name)


def test_the_class_that_the_settings_name_is_loaded():
    with pytest.raises(UserCodeError, match="there is no file"):
        check_user_algorithm(GRPOConfig(name="gone.py:x"))
    check_user_algorithm(GRPOConfig())


# --- what is right ----------------------------------------------------------------------------------------------------


def test_a_class_that_changes_nothing_gives_our_numbers(make):
    theirs = make("Same")
    (experience, metrics), (our_experience, our_metrics) = experience_of(theirs), experience_of(ours())
    assert torch.equal(experience.advantages, our_experience.advantages)
    assert metrics.values() == our_metrics.values()
    ((_, loss, learned),) = losses_of(theirs, experience)
    ((_, our_loss, we_learned),) = losses_of(ours(), our_experience)
    assert torch.equal(loss, our_loss)
    assert learned.values() == we_learned.values()
    assert (theirs.should_stop(learned), theirs.finish(experience), theirs.state_dict()) == (False, Metrics(), {})


def test_attributes_are_those_of_the_users_object(make):
    theirs = make("Same")
    assert (theirs.aggregation, theirs.max_redraws, theirs.max_response_tokens) == ("token", 0, LIMIT)
    theirs.algorithm.max_redraws = 3
    assert theirs.max_redraws == 3


def test_each_loss_is_asked_for_when_it_is_needed(make):
    """Each is run backward before the next forward."""
    theirs = make("RaisesLater")
    experience, _ = experience_of(ours())
    losses = theirs.losses(experience, experience.counted.float())
    assert next(losses)[0] == "actor"
    with pytest.raises(
        UserCodeFailure, match=r"^algorithm\.name classes\.py:RaisesLater\.losses raised KeyError: 'lat"
    ):
        next(losses)


@pytest.mark.usefixtures("production")
@pytest.mark.parametrize("name", ["NotFiniteOffTheMask", "OneGroup", "Weights"])
def test_an_experience_may_differ_from_ours(make, name):
    experience, _ = experience_of(make(name))
    assert len(experience.rollout.rows) % 3 == 0


# --- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("production")
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Raises", r" raised AttributeError: .*'no_such_thing' at /.*/classes\.py:52$"),
        ("Alone2", r" returned .*; expected \(Experience, Metrics\), as in return experience, Metrics\(\)$"),
        ("PlainMetrics", r" returned \(GRPOExperience, dict\); expected \(Experience, Metrics\), as in return exp"),
        ("NumberMetric", r" returned \{'policy/x': 1\.0\} \(dict\) as metrics; expected statistics by name, such as"),
        (
            "PerResponse",
            r" returned a tensor of shape \(6,\) as advantages; expected the shape \(6, 4\), a number for each token "
            r"of each response; where a response has one number, write x\[:, None\]\.expand_as\(logprobs\)$",
        ),
        (
            "Shorter",
            r" returned a tensor of shape \(5, 4\) as advantages; expected a tensor whose first axis is the 6 ",
        ),
        (
            "NotFinite",
            r" returned nan in advantages, for response 1, token 0; expected a finite number wherever `counted` is "
            "True; divide by nothing that can be 0",
        ),
        ("Unsampled", r" returned Scores\(.* as rollout; expected Rollout: pass on rollout$"),
        (
            "Torn",
            r" returned an experience of 5 responses; expected whole groups of algorithm\.group_size \(3\); a resp",
        ),
        (
            "OneWeight",
            r" returned 0\.5 \(float\) as weight; expected a tensor whose first axis is the 6 responses; numb",
        ),
        (
            "FewWeights",
            r" returned a tensor of shape \(2,\) as weight\['b'\]; expected a tensor whose first axis is the",
        ),
    ],
)
def test_an_experience_that_cannot_be_learned_from_is_named(make, name, told):
    with pytest.raises(UserCodeFailure, match=rf"^algorithm\.name classes\.py:{name}\.experience{told}") as failure:
        experience_of(make(name))
    assert len(str(failure.value).splitlines()) == 1


@pytest.mark.usefixtures("production")
@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "Returns",
            r" returned \(str, Tensor, Metrics\); expected an iterator of .* write yield \"actor\", loss, Metri",
        ),
        ("Nothing", r" returned None \(NoneType\); expected an iterator of \(module, loss, metrics\): write yield"),
        ("RaisesLater", r" raised KeyError: 'late' at /.*/classes\.py:134$"),
        (
            "Pair",
            r" yielded \(str, Tensor\); expected \(module, loss, metrics\), as in yield \"actor\", loss, Metrics\(\)$",
        ),
        ("Critic", r" yielded a loss for 'critic'; expected 'actor', the only module that is trained; add what the lo"),
        ("PerToken", r" yielded a tensor of shape \(3,\) as the loss; expected a tensor without dimensions, such as"),
        ("Detached", r" yielded a loss without gradient; compute it from logprobs, with no detach\(\)"),
        ("Infinite", r" yielded -inf as the loss; expected a finite number; select with torch\.where\(weights != 0"),
        (
            "TokenMetric",
            r" yielded a tensor of shape \(6, 4\) in the metric 'policy/x'; expected numbers, or tensors w",
        ),
        (
            "Taken",
            r" yielded \{None: Mean\(.*\)\} \(dict\) as metrics; expected statistics by name, such as",
        ),
    ],
)
def test_a_loss_that_cannot_be_learned_is_named(make, name, told):
    experience, _ = experience_of(ours())
    with pytest.raises(UserCodeFailure, match=rf"^algorithm\.name classes\.py:{name}\.losses{told}"):
        losses_of(make(name), experience)


@pytest.mark.parametrize(
    "name",
    ["score/mean", "score", "score/correct", "actor/grad_norm", "eval/pass_at_4", "tokens/sampled", "iteration"],
)
def test_a_metric_that_the_loop_logs_is_named(make, name):
    theirs = make("Taken")
    theirs.algorithm.name = name
    experience, _ = experience_of(ours())
    told = rf"^algorithm\.name classes\.py:Taken\.losses yielded a metric '{name}', which llmrl logs itself; choose an"
    with pytest.raises(UserCodeFailure, match=told):
        losses_of(theirs, experience)


def run_of(theirs, **kinds):
    """Calls every method as the loop does, for a class whose metric is of these kinds."""
    theirs.algorithm.kinds = {"losses": Mean, "finish": Mean} | kinds
    experience, described = experience_of(theirs)
    update = Metrics()
    for _, _, metrics in losses_of(theirs, experience):
        update = update.merge(metrics)
    return described.merge(update.per_step()).merge(theirs.finish(experience))


@pytest.mark.parametrize("kind", [Mean, Total])
def test_a_total_of_losses_pools_with_means(make, kind):
    metrics = run_of(make("Mixed"), experience=Mean, losses=kind)
    assert metrics.statistics == {"policy/x": Mean(3.0, 3.0)}


@pytest.mark.parametrize(
    ("kinds", "told"),
    [
        ({"experience": Mean, "losses": Maximum}, r"losses yielded a Maximum as the metric 'policy/x', which was a M"),
        ({"experience": Total, "losses": Total}, "losses yielded a Mean as the metric 'policy/x', which was a Total "),
        ({"experience": Mean, "losses again": Total}, "losses yielded a Total as the metric 'policy/x', which was a M"),
        ({"experience": Mean, "finish": Moments}, "finish returned a Moments as the metric 'policy/x', which was a Me"),
    ],
)
def test_a_metric_of_two_kinds_is_named(make, kinds, told):
    with pytest.raises(UserCodeFailure, match=rf"^algorithm\.name classes\.py:Mixed\.{told}"):
        run_of(make("Mixed"), **kinds)


@pytest.mark.usefixtures("production")
@pytest.mark.parametrize(
    ("name", "call", "told"),
    [
        ("Undecided", lambda a: a.should_stop(Metrics()), r"should_stop raised RuntimeError: Boolean value of Tensor"),
        (
            "Unfinished",
            lambda a: a.finish(None),
            r"finish returned None \(NoneType\); expected Metrics, as in return M",
        ),
        (
            "Stateless",
            lambda a: a.state_dict(),
            r"state_dict returned None \(NoneType\); expected a dict, as in return",
        ),
        (
            "StateOfObjects",
            lambda a: a.state_dict(),
            r"state_dict returned \{1, 2\} \(set\) at \['seen'\]\['groups'\]\[0\]; expected numbers, strings and tens",
        ),
        (
            "StateOfNumbers",
            lambda a: a.state_dict(),
            r"state_dict returned \{1: 2\.0\} \(dict\); expected numbers, str",
        ),
        (
            "Forgetful",
            lambda a: a.load_state_dict({}),
            r"load_state_dict raised KeyError: 'total' at /.*/classes\.py:\d+$",
        ),
    ],
)
def test_what_else_a_class_does_wrong_is_named(make, name, call, told):
    with pytest.raises(UserCodeFailure, match=rf"^algorithm\.name classes\.py:{name}\.{told}"):
        call(make(name))


def test_that_the_memory_is_full_is_passed_on(make, monkeypatch):
    def full(sequences):
        raise torch.OutOfMemoryError("no memory")

    theirs = make("Same")
    monkeypatch.setattr(theirs.algorithm.actor, "logprobs", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"^no memory$"):
        experience_of(theirs)


def test_a_failure_of_a_users_function_in_a_users_class_has_one_name(make, tmp_path):
    (tmp_path / "loss.py").write_text("def loss(logprobs, old_logprobs, advantages, weights): return 1 / 0\n")
    theirs = make("Same", loss="loss.py:loss")
    experience, _ = experience_of(theirs)
    with pytest.raises(UserCodeFailure, match=r"^algorithm\.loss loss\.py:loss raised ZeroDivisionError"):
        losses_of(theirs, experience)


# --- settings that are not read ---------------------------------------------------------------------------------------


def test_settings_that_a_class_does_not_read_are_reported_once(make, messages):
    theirs = make("Item", clip_low=0.1, kl_form="k3", scale="none")
    experience, _ = experience_of(theirs)
    theirs.finish(experience)
    assert messages == []  # nothing could be scored: it has not learned yet
    with pytest.raises(UserCodeFailure):
        losses_of(theirs, experience)
    for _ in range(2):
        theirs.finish(experience)
    assert messages == [
        "warning: algorithm.kl_form (k3) is set, and algorithm.name classes.py:Item has not read it in its first "
        "iteration; read config.kl_form, or leave the setting out"
    ]


def test_settings_that_a_class_reads_are_not_reported(make, messages):
    theirs = make("Same", clip_low=0.1, aggregation="sequence", scale="none", overlong_buffer_tokens=2)
    experience, _ = experience_of(theirs)
    losses_of(theirs, experience)
    theirs.finish(experience)
    assert messages == []


def test_what_the_loop_reads_is_not_reported(make, messages):
    """A reference is there because of kl_coef, whatever coefficient the class gives its KL."""
    theirs = make("Item", kl_coef=0.1)
    experience, _ = experience_of(theirs)
    with pytest.raises(UserCodeFailure):
        losses_of(theirs, experience)
    theirs.finish(experience)
    assert messages == []


def test_recorded_settings_can_be_replaced_and_are_settings_of_grpo(make):
    config = make("Same", clip_low=0.1).config
    assert isinstance(config, GRPOConfig)
    assert replace(config, clip_low=0.3).clip_low == 0.3
    assert config.unread() == []  # all were copied


def test_metrics_of_ones_own_are_kept(make, tmp_path):
    text = (tmp_path / "classes.py").read_text()
    (tmp_path / "classes.py").write_text(text.replace("Mean(batch.advantages, 1.0)", "Mean(batch.advantages.sum(), 6)"))
    experience, _ = experience_of(ours())
    ((_, _, metrics),) = losses_of(make("TokenMetric"), experience)
    assert isinstance(metrics.statistics["policy/x"], Mean)
