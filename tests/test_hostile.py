"""Whole commands on input that is made to harm: no payload runs, no secret is shown, no file is open to others.

Each row of the tables in SECURITY.md is a test here, or in the file of tests that it names.
"""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import torch
import yaml
from pyarrow import parquet

from tests.fuzz.workspace import Workspace, make_template
from tests.test_fuzz import run

pytestmark = pytest.mark.slow

PLANTED = "planted"
"""File that a payload makes in the folder where the command runs."""


class Payload:
    """A pickle that makes a file when it is loaded."""

    def __reduce__(self):
        return open, (PLANTED, "w")


CODE = f"open({PLANTED!r}, 'w')\n"


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """Everything in order."""
    folder = tmp_path_factory.mktemp("template")
    make_template(folder)
    return folder


@pytest.fixture
def work(template: Path, tmp_path: Path) -> Workspace:
    shutil.copytree(template, tmp_path / "work")
    return Workspace(tmp_path / "work", "grpo")


# --- payloads ---------------------------------------------------------------------------------------------------------


def pickled(file: Path) -> None:
    with file.open("wb") as stream:  # torch refuses some names
        torch.save({"model.embed_tokens.weight": Payload()}, stream)


def with_code(work: Workspace, file: str, classes: dict) -> None:
    work.edit(file, lambda settings: {**settings, "auto_map": classes})
    (work.model / "own.py").write_text(CODE)


def weights_bin(work: Workspace) -> None:
    (work.model / "model.safetensors").unlink()
    pickled(work.model / "pytorch_model.bin")


def weights_bin_by_index(work: Workspace) -> None:
    (work.model / "model.safetensors").unlink()
    pickled(work.model / "pytorch_model.bin")
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "pytorch_model.bin"}}
    (work.model / "model.safetensors.index.json").write_text(json.dumps(index))


def weights_renamed(work: Workspace) -> None:
    pickled(work.model / "model.safetensors")


def files_beside(work: Workspace) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin", "scheduler.pt"):
        pickled(work.model / name)
    (work.model / "custom_generate").mkdir()
    (work.model / "custom_generate" / "generate.py").write_text(CODE)


def code_of_model(work: Workspace) -> None:
    with_code(work, "config.json", {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})


def code_of_tokenizer(work: Workspace) -> None:
    with_code(work, "tokenizer_config.json", {"AutoTokenizer": ["own.Own", "own.Own"]})


def code_of_kernel(work: Workspace) -> None:
    (work.folder / "own").mkdir()
    (work.folder / "own" / "__init__.py").write_text(CODE)
    work.edit("config.json", lambda settings: {**settings, "attn_implementation": "./own", "use_kernels": True})


def template_escapes(work: Workspace) -> None:
    text = f"{{{{ cycler.__init__.__globals__.os.system('touch {PLANTED}') }}}}{{{{ messages[0].content }}}}"
    (work.model / "chat_template.jinja").write_text(text)


def adapter_pickled(work: Workspace) -> None:
    make_adapter(work, {})
    pickled(work.model / "adapter_model.bin")


def adapter_pickled_as_safetensors(work: Workspace) -> None:
    make_adapter(work, {})
    pickled(work.model / "adapter_model.safetensors")


def adapter_imports(work: Workspace) -> None:
    (work.folder / "own.py").write_text(CODE)
    mapping = {"base_model_class": "Own", "parent_library": "own"}
    make_adapter(work, {"megatron_config": {"a": 1}, "megatron_core": "own", "auto_mapping": mapping})
    (work.model / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")


def make_adapter(work: Workspace, more: dict) -> None:
    work.model.rename(work.folder / "base")
    work.model.mkdir()
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "base_model_name_or_path": "base"}
    (work.model / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": ["q_proj"], **more}))


def tag_in_recipe(work: Workspace) -> None:
    text = (work.folder / "grpo.yaml").read_text()
    (work.folder / "grpo.yaml").write_text(f"{text}\nmore: !!python/object/apply:os.system [touch {PLANTED}]\n")


def tag_in_override(work: Workspace) -> None:
    work.overrides.append(f"reward.functions=!!python/object/apply:os.system [touch {PLANTED}]")


def parquet_with_pickled_type(work: Workspace) -> None:
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Payload())}
    columns = [pyarrow.field(name, pyarrow.string(), metadata=metadata) for name in ("prompt", "answer")]
    table = pyarrow.table([["a b", "c d"], ["1", "2"]], schema=pyarrow.schema(columns, metadata={"pandas": "{"}))
    parquet.write_table(table, work.folder / "rows.parquet")
    work.overrides.append("data.path=rows.parquet")


def folder_with_script(work: Workspace) -> None:
    (work.folder / "rows").mkdir()
    (work.folder / "rows" / "rows.py").write_text(CODE)
    work.overrides.append("data.path=./rows")


def pickled_data(work: Workspace) -> None:
    pickled(work.folder / "rows.pkl")
    work.overrides.append("data.path=rows.pkl")


def pickled_data_by_other_name(work: Workspace) -> None:
    pickled(work.data)


SLOTS: list[Callable[[Workspace], None]] = [
    weights_bin,
    weights_bin_by_index,
    weights_renamed,
    files_beside,
    code_of_model,
    code_of_tokenizer,
    code_of_kernel,
    template_escapes,
    adapter_pickled,
    adapter_pickled_as_safetensors,
    adapter_imports,
    tag_in_recipe,
    tag_in_override,
    parquet_with_pickled_type,
    folder_with_script,
    pickled_data,
    pickled_data_by_other_name,
]


@pytest.mark.parametrize("slot", SLOTS, ids=lambda slot: slot.__name__)
@pytest.mark.parametrize("command", ["grpo", "generate"])
def test_no_payload_runs(work: Workspace, slot, command):
    work.command = command
    slot(work)
    status, printed = run(work)
    assert not (work.folder / PLANTED).exists()
    assert status in (0, 1, 2), printed
    assert "Traceback" not in printed


def test_a_payload_would_show(work: Workspace, monkeypatch):
    monkeypatch.chdir(work.folder)
    pickled(work.folder / "a.bin")
    torch.load(work.folder / "a.bin", weights_only=False)
    assert (work.folder / PLANTED).exists()


def test_no_payload_of_a_checkpoint_or_a_record_runs(work: Workspace):
    assert run(work)[0] == 0
    for file in (work.folder / "out").rglob("*"):
        if file.is_file() and "final" not in file.parts and file.name != ".lock":  # which is empty and never read
            pickled(file)
    for resume in ("true", "auto", "false"):
        work.overrides = [f"run.resume={resume}", "run.num_iterations=2"]
        status, printed = run(work)
        assert status in (0, 1, 2), printed
        assert "Traceback" not in printed
    assert not (work.folder / PLANTED).exists()


# --- secrets ----------------------------------------------------------------------------------------------------------

SECRETS = {
    "argument": "caterpillar-smoke",
    "url": "gryphon-and-mock",
    "override": "white-rabbit-glove",
    "environment": "queen-of-hearts-9",
    "variable": "dormouse-in-a-pot",
    "form": "hf_Abcdefghijklmnopqrstuvwxyz",
    "header": "jabberwocky.slain",
    "nested": "humpty-on-a-wall",
}
RULE = """
import os

def score(responses, answer, **arguments):
    if os.environ.get("FAILS") == "raises":
        raise ValueError(f"{arguments} do not work, nor does {os.environ['JUDGE_API_KEY']}")
    if os.environ.get("FAILS") == "returns":
        return [f"{arguments} {os.environ['JUDGE_API_KEY']}"] * len(responses)
    return [float(len(response)) for response in responses]
"""


@pytest.fixture
def secretive(work: Workspace) -> Workspace:
    work.environment = {"JUDGE_API_KEY": SECRETS["variable"], "NOTE_OF_MINE": SECRETS["environment"]}
    arguments = {
        "api_key": SECRETS["argument"],
        "endpoint": f"https://me:{SECRETS['url']}@judge.example/v1",
        "note": "${oc.env:NOTE_OF_MINE}",
        "model": SECRETS["form"],
        "headers": {"Authorization": f"Bearer {SECRETS['header']}"},
        "credentials": {"pair": ["alice", SECRETS["nested"]]},
    }
    recipe = yaml.safe_load((work.folder / "grpo.yaml").read_text())
    recipe["reward"]["functions"][0]["arguments"] = arguments
    recipe["trackers"] = {"names": ["tensorboard"]}
    (work.folder / "grpo.yaml").write_text(yaml.safe_dump(recipe))
    (work.folder / "rules.py").write_text(RULE.replace("**arguments", ", ".join([*arguments, "token"])).replace(
        "{arguments}", "{(" + ", ".join([*arguments, "token"]) + ")}"
    ))  # fmt: skip
    work.overrides.append(f"reward.functions.0.arguments.token={SECRETS['override']}")
    return work


def shown(work: Workspace) -> list[str]:
    """``file: secret`` of every secret in what was printed and in the files of the run."""
    files = [work.folder / "printed.txt", *(work.folder / "out").rglob("*")]
    contents = {str(file): file.read_bytes() for file in files if file.is_file()}
    return [
        f"{file}: {name}" for file, content in contents.items() for name, x in SECRETS.items() if x.encode() in content
    ]


@pytest.mark.parametrize(
    ("fails", "overrides", "status"),
    [
        ("", [], 0),
        ("", ["--dry-run"], 0),
        ("raises", [], 1),
        ("returns", [], 1),
        ("", ["reward.functions.0.weight=x"], 2),
        ("", ["reward.functions.0.password=alice-in-wonder"], 2),
        ("", [f"reward.functions.0.arguments.api_key={SECRETS['argument']}", "a..b=1"], 2),
    ],
)
def test_no_secret_is_shown_or_written(secretive: Workspace, fails, overrides, status):
    secretive.environment["FAILS"] = fails
    secretive.overrides += overrides
    ended, printed = run(secretive)
    assert ended == status, printed
    assert shown(secretive) == []
    assert "alice-in-wonder" not in printed
    if not overrides:
        settings = json.loads((secretive.folder / "out" / "config.json").read_text())["settings"]
        assert settings["reward"]["functions"][0]["arguments"]["api_key"] == "***"


def test_a_masked_secret_has_not_changed_and_the_rest_has(secretive: Workspace):
    assert run(secretive)[0] == 0
    secretive.overrides += ["run.resume=true", "run.num_iterations=2"]
    status, printed = run(secretive)
    assert status == 0, printed
    changes = [line for line in printed.splitlines() if line.startswith("changed since")]
    assert len([line for line in changes if "run.num_iterations was 1, is 2" in line]) == 1
    assert not [line for line in changes if "arguments" in line]
    assert shown(secretive) == []


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["sft", "reward-model", "grpo", "ppo"])
def test_files_of_a_run_are_its_owners_alone(work: Workspace, command):
    work.command = command
    status, printed = run(work)
    assert status == 0, printed
    out = work.folder / "out"
    found = [out, *out.rglob("*")]
    assert len(found) > 8
    assert [str(path) for path in found if path.stat().st_mode & 0o077] == []
