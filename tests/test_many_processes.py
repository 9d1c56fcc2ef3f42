"""Every algorithm in two processes, launched by the files of recipes/accelerate/: the same responses, numbers and
weights as in one process, plain and under DeepSpeed and FSDP."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.environments.fakes import FORGETS
from tests.mixtures import config_of
from tests.processes import ROOT, TINY, assert_same_run, environment, free_port, lines, write_recipes

pytestmark = pytest.mark.slow

HALF = {"grpo": "run.num_iterations=2", "ppo": "run.num_iterations=2", "reward-model": "reward_model.num_epochs=1"}
"""What makes a run half as long, so that resuming it goes on."""
SHARED = ("critic.network=shared", "critic.warmup_iterations=0")
LORA = (
    "model.lora.rank=2",
    "model.lora.modules_to_save=[embed_tokens,norm,lm_head]",
    "model.gradient_checkpointing=true",
)
"""With the adapter off as the reference."""
LEARNED = (
    "reward.functions=[]",
    "reward.model.path=reward-model/final",
    "run.num_iterations=2",
    "optimizer.learning_rate=2.0e-5",
)
"""A gradient that is all rounding moves a weight by the whole learning rate in Adam's first steps."""
AUXILIARY = ("algorithm.auxiliary_every=1", "algorithm.auxiliary_epochs=2", "critic.warmup_iterations=0")
ADAPTER = ("critic.network=adapter", "critic.warmup_iterations=0", "model.lora.rank=2")
SPLIT = ("distributed.frozen=split",)
ONE_STEP = ("update.num_epochs=1", "update.minibatch_size=6")
"""Without a pass of the actor before the update."""


def tied(folder: Path) -> tuple[str, ...]:
    """A GPT-2: tied embeddings, absolute positions."""
    path = folder / "gpt2"
    if not path.exists():
        shutil.copytree(TINY, path)
        config = json.loads((path / "config.json").read_text())
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "tie_word_embeddings": True}
        kept = {name: config[name] for name in ("vocab_size", "bos_token_id", "eos_token_id") if name in config}
        config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **shape, **kept}
        (path / "config.json").write_text(json.dumps(config))
    return (f"model.path={path}", "run.num_iterations=2")


def command(algorithm: str, output: str, *settings: str) -> list[str]:
    return [algorithm, f"{algorithm}.yaml", f"run.output_dir={output}", *settings]


def halves(algorithm: str, output: str) -> list[list[str]]:
    return [command(algorithm, output, HALF[algorithm]), command(algorithm, output, "run.resume=true")]


def do(folder: Path, launcher: list[str], commands: list[list[str]]) -> None:
    """Runs the commands in the processes of one launch."""
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "tests" / "several.py"), json.dumps(commands)],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def launcher(file: str, *options: str) -> list[str]:
    config = str(ROOT / "recipes" / "accelerate" / f"{file}.yaml")
    common = ["--config_file", config, "--num_processes", "2", "--main_process_port", str(free_port())]
    return ["-m", "accelerate.commands.launch", *common, *options]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what one process makes of each run, and of the first half of one."""
    folder = tmp_path_factory.mktemp("split")
    write_recipes(folder)
    recipe = folder / "reward-model.yaml"
    recipe.write_text(recipe.read_text().replace("evaluate_every: 2", "evaluate_every: 2, num_epochs: 2"))
    alone = [
        *(command(algorithm, algorithm) for algorithm in ("sft", *HALF)),
        command("ppo", "half", HALF["ppo"]),
        command("ppo", "adapter", *ADAPTER),
        command("grpo", "lora", *LORA),
        command("grpo", "one_step", *ONE_STEP),
        command("ppo", "shared", *SHARED),
        command("ppo", "learned", *LEARNED),
        command("ppo", "auxiliary", *LEARNED, *AUXILIARY),
        command("grpo", "tied", *tied(folder)),
    ]
    do(folder, [], alone)
    return folder


@pytest.mark.parametrize("file", ["cpu_two_processes", "gpu_eight_zero2", "gpu_eight_zero3", "gpu_eight_fsdp2"])
def test_two_processes_do_what_one_does(folder: Path, file: str):
    """Each algorithm stopped and resumed; taking up what one process left, and leaving what one takes up."""
    ours = folder / file
    shutil.copytree(folder / "half", ours / "taken_up")
    splits_weights = file in ("gpu_eight_zero3", "gpu_eight_fsdp2")
    commands = [
        command("sft", f"{file}/sft"),
        *(step for algorithm in ("grpo", "reward-model") for step in halves(algorithm, f"{file}/{algorithm}")),
        command("ppo", f"{file}/taken_up", "run.resume=true"),
        command("ppo", f"{file}/left", HALF["ppo"]),
        command("grpo", f"{file}/lora", *LORA),
        *([*step, *ONE_STEP] for step in halves("grpo", f"{file}/one_step")),
        command("ppo", f"{file}/shared", *SHARED, *SPLIT),
        command("ppo", f"{file}/learned", *LEARNED),
        command("ppo", f"{file}/learned_split", *LEARNED, *SPLIT),
        command("grpo", f"{file}/tied", *tied(folder)),
        *([] if splits_weights else [command("ppo", f"{file}/adapter", *ADAPTER)]),
        *([] if "zero" in file else [command("ppo", f"{file}/auxiliary", *LEARNED, *AUXILIARY)]),
    ]
    do(folder, launcher(file), commands)
    do(folder, [], [command("ppo", f"{file}/left", "run.resume=true")])
    pairs = {"taken_up": "ppo", "left": "ppo", "learned_split": "learned"}
    names = [path.name for path in ours.iterdir()]
    assert len(names) == 11 + (not splits_weights) + ("zero" not in file)
    for name in names:
        assert_same_run(folder / pairs.get(name, name), ours / name)
    model = AutoModelForCausalLM.from_pretrained(ours / "tied" / "final")
    assert model.lm_head.weight is model.transformer.wte.weight


AVERAGE = ("algorithm.reference_refresh_every=1", "algorithm.reference_mixing=0.5")
FOLLOWING = {
    "average": ("grpo", *AVERAGE),
    "average_split": ("grpo", *AVERAGE, *SPLIT),
    "copy_of_an_adapter": ("grpo", "algorithm.reference_refresh_every=2", *LORA),
    "copy_of_a_trunk": ("ppo", "algorithm.reference_refresh_every=2", *SHARED),
}
"""Runs whose reference moves, by the folder that they write."""


@pytest.fixture(scope="module")
def following(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what one process makes of each run whose reference moves, without a stop."""
    folder = tmp_path_factory.mktemp("following")
    write_recipes(folder)
    do(folder, [], [command(algorithm, name, *settings) for name, (algorithm, *settings) in FOLLOWING.items()])
    return folder


@pytest.mark.parametrize("file", ["cpu_two_processes", "gpu_eight_zero3", "gpu_eight_fsdp2"])
def test_a_reference_follows_an_actor_that_is_split(following: Path, file: str):
    """Stopped when it has moved, and resumed: the numbers of one process that never stopped."""
    commands = [
        [*step, *settings]
        for name, (algorithm, *settings) in FOLLOWING.items()
        for step in halves(algorithm, f"{file}/{name}")
    ]
    do(following, launcher(file), commands)
    for name in FOLLOWING:
        assert_same_run(following / name, following / file / name)
    assert [line["reference/moved"] for line in lines(following / file / "copy_of_a_trunk" / "metrics.jsonl")[1:]] == [
        0.0, 1.0, 0.0, 1.0,
    ]  # fmt: skip


WAITING = ("update.staleness=2", "update.num_replayed=1", "algorithm.importance=truncated")

BALANCED = ("algorithm.balance_coef=0.1", "algorithm.balance_bias_rate=0.2")


def mixture(folder: Path) -> str:
    """A tiny mixture of experts whose routers have a bias."""
    path = shutil.copytree(TINY, folder / "mixture")
    kept = json.loads((path / "config.json").read_text())
    ids = {name: kept[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id") if name in kept}
    config_of("deepseek_v3", **ids, initializer_range=0.3).save_pretrained(path)
    return f"model.path={path}"


DEADLY = """
import os, signal
from pathlib import Path

def rule(responses):
    checkpoint = Path("FOLDER/killed/checkpoints/step_000002")
    if checkpoint.exists() and not Path("FOLDER/once").exists():
        Path("FOLDER/once").touch()
        os.kill(os.getppid(), signal.SIGKILL)
    return [float(text.count("e") + len(text) % 3) for text in responses]
"""
"""Kills the run in the folder `killed`, whose child this is, after its second iteration."""


def test_rollouts_wait_through_a_kill_and_in_two_processes(tmp_path: Path):
    """Those of a mixture of experts, which is balanced both ways. Three wait in the checkpoint of iteration 2."""
    write_recipes(tmp_path)
    (tmp_path / "rule.py").write_text(DEADLY.replace("FOLDER", str(tmp_path)))
    settings = (*WAITING, *BALANCED, mixture(tmp_path))
    whole, killed = (command("grpo", output, *settings) for output in ("straight", "killed"))
    status = subprocess.run(
        [sys.executable, "-m", "llmrl", *killed], cwd=tmp_path, env=environment(), capture_output=True, check=False
    ).returncode
    assert status == -signal.SIGKILL
    assert len(lines(tmp_path / "killed" / "metrics.jsonl")) < 5
    do(tmp_path, [], [killed, whole])
    models = [(tmp_path / run / "final" / "model.safetensors").read_bytes() for run in ("straight", "killed")]
    assert models[0] == models[1]
    assert_same_run(tmp_path / "straight", tmp_path / "killed")
    do(tmp_path, launcher("cpu_two_processes"), [[*step, *settings] for step in halves("grpo", "split")])
    assert_same_run(tmp_path / "straight", tmp_path / "split")
    agreement = [line["experts/agreement"] for line in lines(tmp_path / "split" / "metrics.jsonl")[1:]]
    assert agreement[0] == 1.0
    assert min(agreement) < 1.0


DICE = """
import llmrl

class Dice(llmrl.Environment):
    def start(self, row):
        self.thrown = self.random.randint(1, 6)
        return f"{row['prompt']} {self.thrown}"

    def respond(self, message):
        self.thrown += self.random.randint(1, 6)
        return llmrl.Turn(f"+{self.thrown}", reward=len(message.text) + self.random.random())

    def close(self):
        return self.thrown / 10
"""


SHORT_STEPS = ("algorithm.kl_coef=0.0", "optimizer.learning_rate=2.0e-5")
"""Without a KL: summed over episodes it is rounded by more than runs are compared to."""
PLAYED = {
    "turns": ("grpo", "model.path=many_ends", "rollout.max_response_tokens=24"),
    "contexts": ("grpo", "model.path=forgetting", "environment.history=branch"),
    "contexts_of_ppo": ("ppo", "model.path=forgetting", "environment.history=branch"),
}
"""Runs of episodes, by the folder that they write."""


def playing(folder: Path) -> dict[str, tuple[str, ...]]:
    """The runs, with an environment that throws dice, and models of which every third id ends a turn."""
    (folder / "dice.py").write_text(DICE)
    for name in ("many_ends", "forgetting"):
        model = shutil.copytree(TINY, folder / name)
        vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(0, vocab_size, 3))}))
    (folder / "forgetting" / "chat_template.jinja").write_text(FORGETS)
    environment = ("environment.name=dice.py:Dice", "environment.max_turns=3")
    common = (*SHORT_STEPS, *environment, "reward.functions=[]")
    own = {
        "grpo": ("algorithm.credit=turn", "algorithm.max_redraws=0"),
        "ppo": ("algorithm.kl_target=null", "critic_optimizer.learning_rate=2.0e-5"),
    }
    return {
        name: (algorithm, "rollout.max_response_tokens=90", *own[algorithm], *common, *settings)
        for name, (algorithm, *settings) in PLAYED.items()
    }


def test_episodes_are_the_same_after_a_resume_and_in_two_processes(tmp_path: Path):
    """To the bit after a resume: an episode is played again from its seeds. In one context each, and in several."""
    write_recipes(tmp_path)
    runs = playing(tmp_path)

    def in_halves(place: str) -> list[list[str]]:
        return [
            [*step, *settings]
            for name, (algorithm, *settings) in runs.items()
            for step in halves(algorithm, f"{place}/{name}")
        ]

    straight = [command(algorithm, f"straight/{name}", *settings) for name, (algorithm, *settings) in runs.items()]
    do(tmp_path, [], [*straight, *in_halves("resumed")])
    do(tmp_path, launcher("cpu_two_processes"), in_halves("split"))
    for name in runs:
        straight, resumed = tmp_path / "straight" / name, tmp_path / "resumed" / name
        for file in ("final/model.safetensors", "samples.jsonl"):
            assert (straight / file).read_bytes() == (resumed / file).read_bytes()
        numbers = lines(straight / "metrics.jsonl")
        assert numbers[-1]["turn/count"] > 1.2
        for ours, theirs in zip(numbers, lines(resumed / "metrics.jsonl"), strict=True):
            assert {name: x for name, x in ours.items() if not name.endswith("_s")} == {
                name: x for name, x in theirs.items() if not name.endswith("_s")
            }
        assert_same_run(straight, tmp_path / "split" / name)
    told = lines(tmp_path / "straight" / "contexts" / "samples.jsonl")
    assert 0 < sum(bool(each["context_starts"]) for each in told) < len(told)


@pytest.mark.parametrize(
    ("file", "options"),
    [
        ("gpu_eight_zero2", ("--zero_stage", "1")),
        ("gpu_eight_zero2", ("--offload_optimizer_device", "cpu")),
        ("gpu_eight_zero3", ("--offload_optimizer_device", "cpu", "--offload_param_device", "cpu")),
    ],
    ids=["zero1", "zero2-offload", "zero3-offload"],
)
def test_what_the_launch_file_says_of_deepspeed_changes_no_number(folder: Path, file: str, options: tuple[str, ...]):
    output = "_".join([file, *options])
    do(folder, launcher(file, *options), halves("grpo", output))
    assert_same_run(folder / "grpo", folder / output)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        (("critic.network=adapter",), "critic.network adapter"),
        (("model.from_scratch=false", "reward.model.on_actor_base=true"), "reward.model.on_actor_base"),
    ],
)
def test_roles_on_one_base_are_refused_where_it_is_split(tmp_path: Path, setting: tuple[str, ...], named: str):
    write_recipes(tmp_path)
    settings = ["model.lora.rank=2", "reward.model.path=nowhere", "run.output_dir=never", *setting]
    split = environment() | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "llmrl", "ppo", "ppo.yaml", *settings],
        cwd=tmp_path, env=split, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"{named}: roles on one base need it whole in every process" in done.stderr
    assert "launch with plain data parallel or ZeRO-2" in done.stderr


def test_two_machines_are_two_launchers(folder: Path):
    """Here both on this one, with a process each."""
    start = [*launcher("two_nodes_zero3"), "-m", "llmrl", *command("grpo", "nodes", HALF["grpo"])]
    running = [
        subprocess.Popen(
            [sys.executable, *start[:2], "--machine_rank", str(machine), *start[2:]],
            cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for machine in range(2)
    ]  # fmt: skip
    told = [each.communicate(timeout=300)[0] for each in running]
    assert [each.returncode for each in running] == [0, 0], told
    do(folder, [], [command("grpo", "nodes", "run.resume=true")])
    assert_same_run(folder / "grpo", folder / "nodes")


FILES = {
    "cpu_one": ("NO", 1, 1),
    "cpu_two_processes": ("MULTI_GPU", 1, 2),
    "gpu_one": ("NO", 1, 1),
    "gpu_eight_ddp": ("MULTI_GPU", 1, 8),
    "gpu_eight_zero2": ("DEEPSPEED", 1, 8),
    "gpu_eight_zero3": ("DEEPSPEED", 1, 8),
    "gpu_eight_fsdp2": ("FSDP", 1, 8),
    "two_nodes_ddp": ("MULTI_GPU", 2, 16),
    "two_nodes_zero3": ("DEEPSPEED", 2, 16),
}


def test_every_launch_file_is_what_its_name_says():
    from accelerate.commands.config.config_args import load_config_from_file

    folder = ROOT / "recipes" / "accelerate"
    assert {file.stem for file in folder.glob("*.yaml")} == FILES.keys()
    for name, (kind, num_machines, num_processes) in FILES.items():
        config = load_config_from_file(str(folder / f"{name}.yaml"))
        assert (config.distributed_type.value, config.num_machines, config.num_processes) == (
            kind,
            num_machines,
            num_processes,
        )
        assert config.use_cpu is name.startswith("cpu")
        assert config.mixed_precision == "no"
