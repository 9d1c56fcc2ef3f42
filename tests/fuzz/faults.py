"""What goes wrong with people's files, settings and rules: one function a fault, by family."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.fuzz.workspace import Workspace

Fault = Callable[[Workspace, random.Random], None]
LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'7' * 64}\nsize 269060552\n"
NASTY = (None, 0, -1, 3.5, 10**30, True, "", " ", "x" * 5000, [], {}, [None], {"a": None}, "\ud83d", "\0", "${a}", "~")


# --- the folder of the model ------------------------------------------------------------------------------------------

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


def _some_file(work: Workspace, rng: random.Random) -> Path:
    return rng.choice([file for file in sorted(work.model.iterdir()) if file.is_file()] or [work.model / "config.json"])


def file_missing(work: Workspace, rng: random.Random) -> None:
    _some_file(work, rng).unlink(missing_ok=True)


def file_is_a_pointer(work: Workspace, rng: random.Random) -> None:
    _some_file(work, rng).write_text(LFS_POINTER)


def file_truncated(work: Workspace, rng: random.Random) -> None:
    file = _some_file(work, rng)
    content = file.read_bytes() if file.exists() else b""
    file.write_bytes(content[: rng.randrange(len(content) + 1)])


def file_damaged(work: Workspace, rng: random.Random) -> None:
    file = _some_file(work, rng)
    content = bytearray(file.read_bytes() if file.exists() else b"")
    for _ in range(rng.randrange(1, 9)):
        if content:
            content[rng.randrange(min(len(content), 4000))] = rng.randrange(256)
    file.write_bytes(content)


def file_is_a_folder(work: Workspace, rng: random.Random) -> None:
    file = _some_file(work, rng)
    file.unlink(missing_ok=True)
    file.mkdir()


def file_holds_other_json(work: Workspace, rng: random.Random) -> None:
    name = rng.choice([name for name in MODEL_FILES if name.endswith(".json")])
    (work.model / name).write_text(rng.choice(["null", "[]", '"text"', "3", "{}", "{", "", "[" * 100_000, "\ufeff{}"]))


def folder_missing(work: Workspace, rng: random.Random) -> None:
    shutil.rmtree(work.model)
    if rng.random() < 0.5:
        work.model.write_text("a file")
    elif rng.random() < 0.5:
        work.model.mkdir()


def config_says(work: Workspace, rng: random.Random) -> None:
    """One key of config.json has another value, mostly one that makes no sense."""
    changes = {
        "model_type": ["llama9", "t5", "bert", "clip", "gpt2", "mamba", *NASTY],
        "architectures": [["LlamaForTokenClassification"], ["Nothing"], "LlamaForCausalLM", *NASTY],
        "hidden_size": [32, 17, *NASTY],
        "vocab_size": [7, 400, *NASTY],
        "num_hidden_layers": [0, 2, *NASTY],
        "num_attention_heads": [3, 0, *NASTY],
        "num_key_value_heads": [3, 0, *NASTY],
        "max_position_embeddings": [8, *NASTY],
        "hidden_act": ["none of these", *NASTY],
        "rope_parameters": [{"rope_type": "wrong"}, {"rope_type": "dynamic", "factor": 2.0}, *NASTY],
        "quantization_config": [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "x"}, *NASTY],
        "dtype": ["float16", "float99", *NASTY],
        "is_encoder_decoder": [True, *NASTY],
        "is_decoder": [False, *NASTY],
        "tie_word_embeddings": [True, *NASTY],
        "eos_token_id": [99999, [0, 1], *NASTY],
        "pad_token_id": [99999, *NASTY],
        "id2label": [{"0": "a", "1": "b"}, *NASTY],
        "auto_map": [{"AutoModelForCausalLM": "modeling.Model"}, *NASTY],
        "output_router_logits": [True],
        "attn_implementation": ["eager", "flash_attention_9", *NASTY],
        "llmrl_score_mean": list(NASTY),
        "llmrl_template": list(NASTY),
    }
    key = rng.choice(list(changes))
    work.edit("config.json", lambda config: {**config, key: rng.choice(changes[key])})


def config_lacks(work: Workspace, rng: random.Random) -> None:
    def drop(config: dict) -> dict:
        gone = rng.choice(sorted(config))
        return {key: value for key, value in config.items() if key != gone}

    work.edit(rng.choice(["config.json", "tokenizer_config.json"]), drop)


def tokenizer_says(work: Workspace, rng: random.Random) -> None:
    keys = (
        "tokenizer_class",
        "eos_token",
        "pad_token",
        "bos_token",
        "model_max_length",
        "chat_template",
        "added_tokens_decoder",
    )
    key = rng.choice([*keys, "additional_special_tokens", "extra_special_tokens", "auto_map", "add_bos_token"])
    value = rng.choice(["LlamaTokenizer", "NoSuchTokenizer", "<new>", {"content": "<end>"}, *NASTY])
    work.edit("tokenizer_config.json", lambda config: {**config, key: value})


def tokenizer_has_more_tokens(work: Workspace, rng: random.Random) -> None:
    def add(tokenizer: dict) -> dict:
        last = max(tokenizer["model"]["vocab"].values())
        token = {"content": "<tool>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        tokenizer["added_tokens"].append({"id": last + rng.choice([1, 1000]), "special": True, **token})
        return tokenizer

    work.edit("tokenizer.json", add)


def generation_says(work: Workspace, rng: random.Random) -> None:
    key = rng.choice(
        ["eos_token_id", "temperature", "top_p", "do_sample", "max_length", "num_beams", "cache_implementation"]
    )
    work.edit("generation_config.json", lambda config: {**config, key: rng.choice(NASTY)})


def weights_are_others(work: Workspace, rng: random.Random) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    file = work.model / "model.safetensors"
    weights = load_file(file)
    name = rng.choice(sorted(weights))
    match rng.randrange(4):
        case 0:
            del weights[name]
        case 1:
            weights["extra.weight"] = torch.zeros(3)
        case 2:
            weights[name] = torch.zeros(5, 7)
        case 3:
            weights[name] = torch.full_like(weights[name], rng.choice([float("nan"), float("inf"), 1e38]))
    save_file(weights, file, metadata={"format": "pt"})


def weights_in_shards(work: Workspace, rng: random.Random) -> None:
    (work.model / "model.safetensors").rename(work.model / "model-00001-of-00002.safetensors")
    shard = rng.choice(["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
    index = rng.choice([{"weight_map": {"model.norm.weight": shard}}, {"weight_map": {}}, {}, []])
    (work.model / "model.safetensors.index.json").write_text(json.dumps(index))


def adapter_beside(work: Workspace, rng: random.Random) -> None:
    base = rng.choice([str(work.folder / "model"), "model", "gone", "", None, 3])
    settings = {"peft_type": rng.choice(["LORA", "PREFIX_TUNING", "none"]), "base_model_name_or_path": base, "r": 4}
    content = rng.choice([json.dumps(settings), "{", "null", LFS_POINTER])
    adapter = work.folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(content)
    (adapter / "adapter_model.safetensors").write_bytes(rng.choice([b"", b"junk", LFS_POINTER.encode()]))
    shutil.rmtree(work.model)
    adapter.rename(work.model)


# --- templates --------------------------------------------------------------------------------------------------------


def template_is_odd(work: Workspace, rng: random.Random) -> None:
    text = rng.choice(
        [
            "{{ raise_exception('no system role') }}",
            "{% if messages[0].role == 'user' %}{{ raise_exception('start with the system') }}{% endif %}ok",
            "{% for m in messages %}{{ m.content }}",
            "{{ messages[7].content }}",
            "{{ nothing.at.all }}",
            "{{ messages | frobnicate }}",
            "",
            "   ",
            "constant",
            "{% for i in range(10 ** 9) %}x{% endfor %}",
            "{{ 1 / 0 }}",
            "{{ 'a' * 10000000000 }}",
            "{{ 10 ** 10 ** 10 }}",
            "{{ strftime_now('%Y') }}{{ messages[-1].content }}",
            "{{ ''.__class__.__mro__ }}",
            "{{ messages[0]['content'] + 3 }}",
            "{% generation %}{{ messages[0].content }}{% endgeneration %}",
            "{% include 'other' %}",
            "{{ tools[0] }}",
        ]
    )
    file = work.model / "chat_template.jinja"
    if file.parent.is_dir():
        file.write_text(text)


def template_opens_thinking(work: Workspace, rng: random.Random) -> None:
    template = work.model / "chat_template.jinja"
    if template.exists():
        template.write_text(template.read_text().replace("'<assistant>'", "'<assistant><think>\\n'"))


# --- data -------------------------------------------------------------------------------------------------------------


def _rows(work: Workspace) -> list:
    try:
        return [json.loads(line) for line in work.data.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError):
        return [{"prompt": "a", "response": "b", "answer": "c"}]


def _write(work: Workspace, rows: list) -> None:
    if work.data.is_dir():
        return
    work.data.write_text("".join(json.dumps(row) + "\n" for row in rows))


def cell_is_odd(work: Workspace, rng: random.Random) -> None:
    rows = _rows(work)
    messages = [
        [{"role": "user", "content": "Hi"}],
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
        [{"role": "assistant", "content": "Hi"}],
        [{"role": "user", "content": None}],
        [{"role": "user"}],
        [{"from": "human", "value": "Hi"}],
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        [{"role": "developer", "content": "Hi"}],
        [3],
        [{"role": 3, "content": "Hi"}],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
    ]
    for row in rng.choice([rows, rows[:1], rows[-1:]]):
        if isinstance(row, dict) and row:
            row[rng.choice(sorted(row))] = rng.choice([*NASTY, *messages])
    _write(work, rows)


def column_missing(work: Workspace, rng: random.Random) -> None:
    rows = _rows(work)
    for row in rng.choice([rows, rows[:1]]):
        if isinstance(row, dict) and row:
            name = rng.choice(sorted(row))
            value = row.pop(name)
            if rng.random() < 0.5:
                row[rng.choice([name + "s", "messages", "responses", "tokens", "completions", "score", " "])] = value
    _write(work, rows)


def row_is_no_object(work: Workspace, rng: random.Random) -> None:
    _write(work, [*_rows(work), rng.choice([None, 3, "text", [], [1], True])])


def data_bytes(work: Workspace, rng: random.Random) -> None:
    if work.data.is_dir():
        return
    content = work.data.read_bytes() if work.data.exists() else b""
    text = content.decode("utf-8", "replace")
    odd = [
        b"",
        b"\n\n\n",
        b"\xef\xbb\xbf" + content,
        content.replace(b"\n", b"\r\n\r\n"),
        text.encode("utf-16"),
        "ü\n".encode("latin-1") + content,
        content[: rng.randrange(len(content) + 1)],
        b"[" * 100_000,
        b'{"prompt": ' + b"9" * 5000 + b"}\n",
        b'{"prompt": NaN}\n' + content,
        b'{"prompt": "a", "prompt": "b"}\n' + content,
        b'{"prompt": "\\ud83d", "response": "\\ud83d", "chosen": "\\ud83d", "rejected": "x", "answer": "1"}\n'
        + content,
        b"\0\0\0" + content,
        LFS_POINTER.encode(),
        b"[" + b",".join(content.splitlines()) + b"]",
        bytes(rng.randrange(256) for _ in range(200)),
    ]
    work.data.write_bytes(rng.choice(odd))


def data_of_another_kind(work: Workspace, rng: random.Random) -> None:
    suffix = rng.choice([".csv", ".json", ".parquet", ".jsonl.gz", ".txt", ".tsv", ""])
    other = work.data.with_name("other" + suffix)
    if rng.random() < 0.3:
        other.mkdir()
    elif work.data.is_file():
        shutil.copy(work.data, other)
    work.overrides.append(f"data.path={other.name}")


def data_missing(work: Workspace, rng: random.Random) -> None:
    if work.data.is_file():
        work.data.unlink()
    if rng.random() < 0.5 and not work.data.exists():
        work.data.mkdir()


# --- settings ---------------------------------------------------------------------------------------------------------


def override_is_odd(work: Workspace, rng: random.Random) -> None:
    """A setting of this command, or one that only looks like it, with a value that is seldom meant."""
    from llmrl.config import GRPORun, PPORun, RewardModelRun, SFTRun
    from llmrl.settings import describe

    runs = {"sft": SFTRun, "reward-model": RewardModelRun, "ppo": PPORun}
    paths = [setting.path for setting in describe(runs.get(work.command, GRPORun))]
    path = rng.choice(paths).replace("<n>", str(rng.choice([0, 7, -1]))).replace("<name>", "x")
    values = ["", "null", "~", "-1", "0", "1e400", "nan", "[]", "{}", "{a: 1}", "[1, 2]", "true", "text # more", "${a}"]
    values += ["'", '"', "a: b", "@", "!!python/object:x", "9" * 400, "\t", "\n", "ü", "/dev/null", "/proc/x", ".", "*"]
    values += ["${model}", "&a", "- b", "%", "\\", "=", "1_000", "0x10", "1e-5", ".5", "2024-01-01", "None"]
    work.overrides.append(f"{path}={rng.choice(values)}")


def override_is_no_setting(work: Workspace, rng: random.Random) -> None:
    work.overrides.append(
        rng.choice(
            ["=", "a", "a=", ".a=1", "a..b=1", "model=3", "run.=1", "reward.functions=x", "[0]=1", "model.path.x=1"]
        )
    )


def recipe_is_odd(work: Workspace, rng: random.Random) -> None:
    file = work.folder / f"{'grpo' if work.command == 'evaluate' else work.command}.yaml"
    if not file.exists():
        return
    text = file.read_text()
    odd = [
        "",
        "- a\n",
        "3",
        "a: [",
        "\t" + text,
        text + text,
        text + "\nmore: 1\n",
        "!!python/object/apply:os.getcwd []",
    ]
    odd += [
        "a: &a [*a]",
        text.replace("model", "modle"),
        "\0",
        "run: null",
        "run: []",
        text[: rng.randrange(len(text))],
    ]
    match rng.randrange(8):
        case 0:
            file.unlink()
        case 1:
            file.unlink()
            file.mkdir()
        case 2:
            file.write_bytes(text.encode("utf-16"))
        case _:
            file.write_text(rng.choice(odd))


def output_is_odd(work: Workspace, rng: random.Random) -> None:
    place = rng.choice(
        ["model", "prompts.jsonl", "prompts.jsonl/x", "/proc/nothing", "", ".", "out", "/dev/null", "x" * 300]
    )
    if place == "out":
        (work.folder / "out").mkdir(exist_ok=True)
        content = rng.choice(["", "{", "[]", '{"settings": 3}', '{"settings": {"run": {}}, "versions": {}}'])
        (work.folder / "out" / rng.choice(["config.json", "metrics.jsonl", "samples.jsonl"])).write_text(content)
        if rng.random() < 0.5:
            (work.folder / "out" / "checkpoints" / "step_000001").mkdir(parents=True, exist_ok=True)
            work.overrides.append("run.resume=true")
    work.overrides.append(f"run.output_dir={place}")


def lora_is_odd(work: Workspace, rng: random.Random) -> None:
    targets = rng.choice(
        ["[all-linear]", "all-linear", "[c_attn]", "[q_proj, nothing]", "[lm_head]", "[embed_tokens]", "['']"]
    )
    work.overrides += ["model.lora.rank=2", f"model.lora.targets={targets}"]


# --- rules ------------------------------------------------------------------------------------------------------------


def rules_do_not_load(work: Workspace, rng: random.Random) -> None:
    texts = [
        "def score(:",
        "raise RuntimeError('no')",
        "import nothing_like_this",
        "import sys; sys.exit(3)",
        "score = 3",
    ]
    texts += [
        "",
        "\0",
        "def scores(responses): return []",
        "from rules import score",
        "class score: pass",
        "1/0",
        "import os",
    ]
    texts += [
        "def score(nothing): return []",
        "def score(): return []",
        "def score(responses, /): return []",
        "score = len",
    ]
    (work.folder / "rules.py").write_text(rng.choice(texts))


def rules_fail(work: Workspace, rng: random.Random) -> None:
    bodies = ["raise ValueError('x')", "raise SystemExit(3)", "raise StopIteration", "return score(responses)", "1 / 0"]
    bodies += ["raise MemoryError", "raise OSError(28, 'No space left')", "raise TimeoutError", "assert False"]
    bodies += ["raise type('Odd', (Exception,), {'__str__': lambda self: 1 / 0})()"]
    (work.folder / "rules.py").write_text(f"def score(responses, **rest):\n    {rng.choice(bodies)}\n")


def rules_return(work: Workspace, rng: random.Random) -> None:
    values = [
        "None",
        "1.0",
        "'text'",
        "[]",
        "[1.0]",
        "[None for r in responses]",
        "['1' for r in responses]",
        "{}",
        "iter([1])",
    ]
    values += [
        "[float('nan') for r in responses]",
        "[1e39 for r in responses]",
        "[[1.0] for r in responses]",
        "[True] * 99",
    ]
    values += [
        "[(1, 2) for r in responses]",
        "[[(0, 1.0)] for r in responses]",
        "[[(-1, 1.0)] for r in responses]",
        "score",
    ]
    values += [
        "[object() for r in responses]",
        "[{'score': 1} for r in responses]",
        "[10**400 for r in responses]",
        "b'abc'",
    ]
    values += [
        "__import__('numpy').ones((len(responses), 2))",
        "__import__('torch').ones(len(responses), dtype=complex)",
    ]
    awaits = rng.choice(["", "", "async "])
    (work.folder / "rules.py").write_text(f"{awaits}def score(responses, **rest):\n    return {rng.choice(values)}\n")


def rules_meddle(work: Workspace, rng: random.Random) -> None:
    bodies = ["import os; os.chdir('/')", "responses.clear()", "rest.clear()", "import shutil; shutil.rmtree('out')"]
    bodies += ["[p.clear() for p in rest['prompts'] if isinstance(p, list)]", "import sys; sys.modules.clear"]
    bodies += ["import warnings; warnings.warn('odd')", "print('\\ud83d'.encode('utf-8', 'surrogatepass'))"]
    scores = "[float(n) for n, r in enumerate(responses)]"
    (work.folder / "rules.py").write_text(
        f"def score(responses, **rest):\n    s = {scores}\n    {rng.choice(bodies)}\n    return s\n"
    )


FAMILIES: dict[str, tuple[Fault, ...]] = {
    "folder": (
        file_missing,
        file_is_a_pointer,
        file_truncated,
        file_damaged,
        file_is_a_folder,
        file_holds_other_json,
        folder_missing,
        config_says,
        config_says,
        config_says,
        config_lacks,
        tokenizer_says,
        tokenizer_has_more_tokens,
        generation_says,
        weights_are_others,
        weights_in_shards,
        adapter_beside,
    ),
    "template": (template_is_odd, template_opens_thinking),
    "data": (
        cell_is_odd,
        cell_is_odd,
        column_missing,
        row_is_no_object,
        data_bytes,
        data_of_another_kind,
        data_missing,
    ),
    "setting": (override_is_odd, override_is_odd, override_is_no_setting, recipe_is_odd, output_is_odd, lora_is_odd),
    "rule": (rules_do_not_load, rules_fail, rules_return, rules_meddle),
}
"""A fault that stands twice is drawn twice as often."""
