"""The command line: a command for each kind of run, and for what is done with the model that it leaves.

Exit status: 0 done, 1 a run that failed, 2 input that cannot be used, 128 + n stopped by signal n.
"""

import json
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from typer.core import TyperGroup

from llmrl.distributed.stop import STOP, Interrupted
from llmrl.errors import Error
from llmrl.files import REFUSALS, read_object
from llmrl.messages import in_units, shown, visible, with_interval, without_ends
from llmrl.output_streams import ignore_warnings_to_authors, lasting_output
from llmrl.secrets import masked, remember_environment
from llmrl.settings import SettingError, describe, is_unicode, owner, read_either, to_dict, to_yaml, unknown_names
from llmrl.starters.folders import STARTERS, find_starter, missing_commands, run_in, write_starter
from llmrl.starters.listing import list_recipes, read_recipe_text
from llmrl.wiring.runs import RUNS, Kind


class Commands(TyperGroup):
    """The commands. A signal ends each of them with one line and the status 128 + n; output without a reader does not
    end them."""

    def invoke(self, ctx: Any) -> Any:
        with lasting_output():
            try:
                with STOP.listening(raises=True):
                    return super().invoke(ctx)
            except Interrupted as stopped:
                _fail(stopped, 128 + stopped.number)
            except KeyboardInterrupt:
                _fail("interrupted", 130)
            except RuntimeError as error:
                if not isinstance(error.__cause__, Interrupted):
                    raise
                _fail(error.__cause__, 128 + error.__cause__.number)  # it came while Python 3.11 was making a class


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _at_home(path: Path | None) -> Path | None:
    """A path with the home folder in place of a tilde, which no shell expands after ``--output=``."""
    return path and path.expanduser()


KEEPS_MEMORY = "Keeps freed memory for the next tensors; MALLOC_MMAP_MAX_=65536 in the environment turns that off."
UNBOUNDED = 10_000
"""Characters of a line that no table reaches."""
HEAD_START_S = 3.0
"""Seconds that other processes wait while the first on a machine prints an error that all have: a launcher ends every
process as soon as one ends."""

Recipe = Annotated[Path, typer.Argument(help="A YAML file of settings, such as those in recipes/.", callback=_at_home)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings that replace the recipe's: key=value, as in run.seed=1, reward.functions.0.weight=2 or "
        "model.lora.targets=\\[q_proj,v_proj]. A text is what the shell hands over, character by character; all "
        "else is YAML. ${run.seed} is the value of another setting, \\${ the two characters ${."
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Checks everything and prints the recipe and the memory it takes; loads no model."),
]


def main() -> None:
    """Entry point of the command `llmrl`."""
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # read when torch is imported; lengths differ from batch to batch
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    remember_environment()
    try:
        app()
    except SystemExit as done:
        if isinstance(done.code, int | None):
            _end_at_once(done.code or 0)
        raise
    except BaseException:
        trace = shown(traceback.format_exc())
        _end_at_once(1, trace)
        print(trace, end="", file=sys.stderr)
        raise SystemExit(1) from None


def _print_version(asked: bool) -> bool:
    if asked:
        print(f"llmrl {version_of('llmrl')}")
        raise typer.Exit
    return asked


@app.callback(help=__doc__)
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Prints the version and exits.")
    ] = False,
) -> None:
    """Options that stand before a command."""


def _command(verb: str, kind: Kind) -> Callable[..., None]:
    """The command that trains a kind of run."""

    def command(recipe: Recipe, overrides: Overrides = None, dry_run: DryRun = False) -> None:
        from llmrl.trainers.changes import changes_in, is_finished
        from llmrl.wiring.contents import recorded_settings

        with bad_input_ends_with_status_2():
            check, build = kind.checker(), kind.builder()
            config = _read(recipe, overrides, verb)
            checked = check(config, dry=dry_run)
        if dry_run:
            _print_dry_run(config, checked)
            return
        changes = changes_in(config.run.folder, recorded_settings(config), checked.contents)
        if is_finished(config.run, changes):
            _print_end(config.run, changes)
        else:
            _train(config, checked, build)

    return command


for _verb, _kind in RUNS.items():
    app.command(_verb, help=_kind.help)(_command(_verb, _kind))


@app.command()
def evaluate(
    recipe: Recipe,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="Writes the numbers to this JSON file.", callback=_at_home)
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(help="An earlier --output: sets its numbers beside these, with differences.", callback=_at_home),
    ] = None,
) -> None:
    """Accuracy and pass@k of a GRPO or PPO recipe's model on its held-out prompts, with 95 % confidence intervals."""
    with bad_input_ends_with_status_2():
        from llmrl.wiring.checks import check_rl
        from llmrl.wiring.process import warn_without_gpu
        from llmrl.wiring.rl import build_evaluator

        config = _read(recipe, overrides, *(verb for verb, kind in RUNS.items() if kind.samples))
        if config.evaluation_data is None:
            raise SettingError(f"{recipe}: evaluation_data is not set; name the held-out prompts")
        _check_output(output)
        output = output and output.absolute()  # a reward may change the working directory
        before = None if compare is None else _earlier(compare)
        checked = check_rl(config, dry=False, trains=False)
    _prepare_process(deterministic=config.run.deterministic)
    with failures_in_one_line(), _context(config.distributed) as context:
        warn_without_gpu(context)
        measured = build_evaluator(config, checked, context).measure()
    if not context.collectives.is_first:
        raise typer.Exit()
    if output is not None:
        _write(output, json.dumps({"model": config.model.path, **measured.to_record()}, indent=1))
    _compare(config.model.path, measured, before)
    print(f"Accuracy is the share of responses with {config.criterion} > {config.evaluation.correct_above:g}.")


@app.command()
def score(
    model: Annotated[str, typer.Argument(help="A reward model's folder or hub name.")],
    file: Annotated[str, typer.Argument(help="Rows of prompts and responses, as llmrl sft reads them.")],
    output: Annotated[
        Path | None, typer.Option(help="Writes the rows with their scores to this JSONL file.", callback=_at_home)
    ] = None,
    prompt_column: Annotated[str, typer.Option(help="Column of the prompt: a text or messages.")] = "prompt",
    response_column: Annotated[str, typer.Option(help="Column of the response.")] = "response",
    normalize: Annotated[bool, typer.Option(help="By the mean and the spread that are stored with the model.")] = True,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allows the folder to bring and run its own Python code.")
    ] = False,
) -> None:
    """Scores responses by a reward model."""
    names = {"data.prompt_column": "--prompt-column", "data.response_column": "--response-column", "data.path": "FILE"}
    with bad_input_ends_with_status_2(), _named_as_given(names):
        from llmrl.data.config import SupervisedDataConfig
        from llmrl.data.supervised import read_supervised_rows
        from llmrl.distributed.device import pick_device
        from llmrl.models.config import ModelConfig
        from llmrl.wiring.checks import check_scorer
        from llmrl.wiring.process import quieten
        from llmrl.wiring.rewards import score_rows

        _check_output(output)
        if output is not None and output.resolve() == Path(file).expanduser().resolve():
            raise SettingError(f"--output ({output}) is the file that is scored; name another")
        _refuse_recipe(model)
        config = ModelConfig(path=model, trust_remote_code=trust_remote_code)
        check_scorer(config)
        data = SupervisedDataConfig(path=file, prompt_column=prompt_column, response_column=response_column)
        rows = read_supervised_rows(data)
        if any("score" in row for row in rows):
            raise SettingError(f"{file} already has a column 'score', which would be lost; rename it or take it out")
    _prepare_process()
    with failures_in_one_line(), _named_as_given(names):
        quieten()
        scores = score_rows(config, rows, data, pick_device(), normalize=normalize)
    lines = [json.dumps({**row, "score": value}, default=str) for row, value in zip(rows, scores, strict=True)]
    if output is None:
        print("\n".join(lines))
    else:
        _write(output, "\n".join(lines))
    print(f"{len(scores)} responses, mean score {sum(scores) / len(scores):.4g}", file=sys.stderr)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A model folder or a hub name.")],
    prompts: Annotated[list[str], typer.Argument(help="Texts to respond to.")],
    temperature: Annotated[float, typer.Option(help="Samples at this temperature; 0 takes the likeliest token.")] = 0.0,
    num_responses: Annotated[int, typer.Option(min=1, help="Responses per prompt.")] = 1,
    max_response_tokens: Annotated[int, typer.Option(min=1, help="Length limit of a response.")] = 256,
    system_prompt: Annotated[str | None, typer.Option(help="System message before each prompt.")] = None,
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option(help="Arguments of the chat template, a JSON object such as '{\"enable_thinking\": false}'."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the random stream.")] = 0,
    environment: Annotated[
        str | None,
        typer.Option(
            help="Plays against path/to/file.py:Class, or as a recipe's section environment says. A prompt that is a "
            "JSON object is then a row of data, which the environment gets."
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allows the folder to bring and run its own Python code.")
    ] = False,
) -> None:
    """Responds to prompts, or plays. A terminal gets control characters escaped, a file or a pipe as they are."""
    names = {
        "rollout.max_response_tokens": "--max-response-tokens",
        "data.system_prompt": "--system-prompt",
        "data.chat_template_kwargs": "--chat-template-kwargs",
    }
    with bad_input_ends_with_status_2(), _named_as_given(names):
        from llmrl.distributed.device import pick_device
        from llmrl.models.checking import check_model
        from llmrl.models.config import ModelConfig
        from llmrl.models.loading import load_tokenizer
        from llmrl.wiring.engines import play, respond, sampling_at, typed_prompts
        from llmrl.wiring.environments import check_environment
        from llmrl.wiring.process import quieten

        if not 0 <= temperature < math.inf:
            raise SettingError(f"--temperature ({temperature}) must be a finite number, 0 or greater")
        if temperature == 0 and num_responses > 1:
            raise SettingError(f"--num-responses ({num_responses}) would all be the likeliest one; set --temperature")
        for text in (*prompts, system_prompt or ""):
            if not is_unicode(text):
                raise SettingError(f"the prompt {text!r} is no UTF-8 text")
        arguments = _object(chat_template_kwargs)
        _refuse_recipe(model)
        config = ModelConfig(path=model, trust_remote_code=trust_remote_code)
        check_model(config, may_be_random=False)
        limits = {"num_responses": num_responses, "max_response_tokens": max_response_tokens, "seed": seed}
        data = typed_prompts(system_prompt, arguments)
        played = environment and check_environment(_environment(environment), load_tokenizer(config), data)
    _prepare_process()
    with failures_in_one_line(), _named_as_given(names):
        quieten()
        if played:
            rows, sampling = [_row(text) for text in prompts], sampling_at(temperature, **limits)
            rollout = play(config, rows, pick_device(), environment=played, data=data, sampling=sampling)
            _print_episodes(rollout)
            assert rollout.episodes is not None, "an environment answered"
            if failure := rollout.episodes.total_failure():
                _fail(failure, 1)
            return
        responses = respond(
            config,
            prompts,
            pick_device(),
            system_prompt=system_prompt,
            chat_template_kwargs=arguments,
            temperature=temperature,
            **limits,
        )
    _print_responses(prompts, responses)


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="The folder of a run, its run.output_dir.", callback=_at_home)],
    repo: Annotated[str, typer.Argument(help="Name of the repository on the hub: owner/name.")],
    best: Annotated[bool, typer.Option("--best", help="Takes best/, of a run that has not ended too.")] = False,
    private: Annotated[bool, typer.Option("--private", help="A repository that is made is seen by you alone.")] = False,
) -> None:
    """Publishes the model of a run on the Hugging Face hub, with its model card."""
    with bad_input_ends_with_status_2():
        from llmrl.hub import HubError, push_folder
        from llmrl.models.folders import adapters_on_folders
        from llmrl.trainers.output import model_of_run

        folder = model_of_run(run, best=best)
        left_out = adapters_on_folders(folder)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder)
        if not any(name.is_relative_to(adapter) for adapter in left_out):
            print(f"{in_units(file.stat().st_size):>10}  {shown(str(name))}")
    for adapter in left_out:
        print(f"{'left out':>10}  {adapter}/, whose base is a folder of this machine")
    try:
        url = push_folder(folder, repo, private=private, left_out=left_out)
    except HubError as error:
        _fail(error, 1)
    print(f"The model is at {url}")


@app.command()
def settings(run: Annotated[str, typer.Argument(help=", ".join(RUNS))]) -> None:
    """Every setting with its default and what it does."""
    with bad_input_ends_with_status_2():
        if run not in RUNS:
            raise SettingError(f"{run} has no settings; choose {' or '.join(RUNS)}")
    for path, kind, default, text in describe(RUNS[run].settings):
        if sys.stdout.isatty():
            print(f"{path}  ({kind}{', ' if default else ''}{default})\n    {text}")
        else:
            print(path, kind, default, text, sep="\t")


@app.command()
def new(
    starter: Annotated[
        str, typer.Argument(help="; ".join(f"{name}: {starter.summary}" for name, starter in STARTERS.items()))
    ],
    folder: Annotated[Path, typer.Argument(help="A folder that is new or empty.", callback=_at_home)],
) -> None:
    """Writes a folder to start from: recipe, data, reward and README. Trains the model that the recipe starts from:
    a minute or more."""
    with bad_input_ends_with_status_2():
        chosen = find_starter(starter)
        write_starter(chosen, folder)
    for command in missing_commands(chosen, folder):
        print(f"{folder}$ {command}", flush=True)
        if status := run_in(folder, command):
            _fail(f"`{command}` in {folder} ended with status {status}; the same command again goes on from there", 1)
    print(f"{folder} is ready; its README.md says what is what. Go on with\n    cd {folder}\n    {chosen.next_command}")


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Prints this recipe, to be saved and changed: > mine.yaml")] = None,
) -> None:
    """Lists the recipes that come with llmrl, or prints one."""
    if name is not None:
        with bad_input_ends_with_status_2():
            text = read_recipe_text(name)
        print(text, end="")
        return
    for recipe in list_recipes():
        if sys.stdout.isatty():
            print(f"{recipe.name}  ({recipe.command})\n    {recipe.summary}")
        else:
            print(*recipe, sep="\t")


@app.command()
def verify(
    algorithm: Annotated[
        str | None,
        typer.Argument(
            help="grpo, ppo, one row of the table, or code of yours, path/to/file.py:name: a class, a baseline or a "
            "loss. All rows where it is left out."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leaves out the training to the optimum.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Writes the numbers to this JSON file.", callback=_at_home)
    ] = None,
) -> None:
    """Compares the gradient of algorithms with what they claim, on a language model that is enumerated.

    Exit status 1 where one of them is not what it claims, see docs/verify.md.
    """
    with bad_input_ends_with_status_2():
        import torch

        from llmrl.verify.table import lines_of
        from llmrl.verify.targets import rows_of
        from llmrl.verify.verdict import verify_all

        _check_output(output)
        rows = rows_of(algorithm)
    torch.set_num_threads(1)  # on tables this small more threads wait for each other
    with failures_in_one_line():
        findings = verify_all(rows, quick=quick)
    print("\n".join(lines_of(findings)))
    if output is not None:
        _write(output, json.dumps([report.to_record() for report in findings.reports], indent=1))
    raise typer.Exit(0 if findings.hold else 1)


def _read(recipe: Path, overrides: list[str] | None, *commands: str) -> Any:
    """The run that a recipe of one of these commands describes."""
    try:
        return read_either([RUNS[command].settings for command in commands], recipe, overrides or [])
    except SettingError:
        whose = owner({verb: kind.settings for verb, kind in RUNS.items()}, recipe)
        if whose is None or whose in commands:
            raise
        asked = " or ".join(f"`llmrl {command}`" for command in commands)
        foreign = ", ".join(unknown_names(RUNS[commands[0]].settings, recipe)[:3])
        raise SettingError(
            f"{recipe} is a recipe of `llmrl {whose}`, not of {asked}, which has no {foreign}; run that, leave these "
            "out, or name another recipe"
        ) from None


def _object(text: str | None) -> dict[str, Any]:
    """The JSON object that an option holds; empty where it is not given."""
    try:
        value = {} if text is None else json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise SettingError(
            f"--chat-template-kwargs ({text}) must be a JSON object, as in '{{\"enable_thinking\": false}}'"
        )
    return value


def _environment(name: str) -> Any:
    """Settings of the environment that an option names: a class, or a recipe with such a section."""
    from llmrl.environments.config import EnvironmentConfig

    if not name.endswith((".yaml", ".yml")):
        return EnvironmentConfig(name=name)
    recipe = Path(name).expanduser()
    config = _read(recipe, None, *(verb for verb, kind in RUNS.items() if kind.samples)).environment
    if config is None:
        raise SettingError(f"--environment ({name}) is a recipe without environment; name one that has it")
    return config


def _row(text: str) -> dict[str, Any]:
    """The row of data that a prompt is: a JSON object, or a text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"prompt": text}


def _refuse_recipe(model: str) -> None:
    if model.endswith((".yaml", ".yml")):
        raise SettingError(f"MODEL ({model}) is a recipe; name a model folder, such as the final/ of its output folder")


def _train(config: Any, checked: Any, build: Callable[..., Any]) -> None:
    from llmrl.wiring.process import opened, private_files

    keeps_memory = _prepare_process(deterministic=config.run.deterministic)
    with (
        failures_in_one_line(config.run.folder),
        _context(config.distributed) as context,
        opened(config, checked, build, context) as run,
        private_files(),
    ):
        if keeps_memory:
            context.progress.message(KEEPS_MEMORY)
        run.train()
    if not context.collectives.is_first:
        raise typer.Exit()
    _print_results(config.run)


def _prepare_process(*, deterministic: bool = False) -> bool:
    """Configures torch and the allocator, before any computation. Returns whether freed memory is kept."""
    from llmrl.distributed.device import keep_freed_memory, prepare_device

    prepare_device(deterministic=deterministic)
    return keep_freed_memory()


@contextmanager
def _context(config: Any) -> Iterator[Any]:
    """Context of a command, see `joined`; of those that a signal stops only the first rank prints it."""
    from llmrl.distributed.collectives import leave_ranks
    from llmrl.trainers.run import Stopped
    from llmrl.wiring.process import joined

    stopped, is_first = None, True
    try:
        with joined(config) as context:
            is_first = context.collectives.is_first
            yield context
    except Stopped as error:
        stopped = error
    leave_ranks()
    if stopped is not None:
        raise stopped if is_first else typer.Exit(stopped.status)


def _end_at_once(status: int, message: str = "") -> None:
    """Ends each of several processes without its interpreter's shutdown: threads that gloo leaves there
    would now and then abort it there, and NCCL would wait there for a rank that is gone."""
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        sys.stdout.flush()
        sys.stderr.write(message)
        sys.stderr.flush()
        os._exit(status)


@contextmanager
def bad_input_ends_with_status_2() -> Iterator[None]:
    """Context of everything before a model loads: what is wrong there is the input."""
    ignore_warnings_to_authors()
    with _outer_causes_in_one_line(2):
        try:
            yield
        except ValueError as error:
            if not _is_first_on_machine():
                time.sleep(HEAD_START_S)
                raise typer.Exit(2) from error
            _fail(error, 2)


@contextmanager
def _named_as_given(names: Mapping[str, str]) -> Iterator[None]:
    """Context of a command that has arguments in place of a recipe: its errors name these, not the settings."""
    from llmrl.data.files import DataError
    from llmrl.data.rows import SKIP
    from llmrl.models.folders import ModelError
    from llmrl.rollout.support import RolloutError

    try:
        yield
    except (DataError, ModelError, RolloutError) as error:
        message = str(error).removesuffix(f"\n{SKIP}")
        message = re.sub(r"(set )?\bmodel\.trust_remote_code=true", "add --trust-remote-code", message)
        message = re.sub(r"\b(reward\.)?model\.path=", "", message)
        message = re.sub(r"\b(reward\.)?model\.path\b", "MODEL", message)
        for setting, name in names.items():
            message = message.replace(setting, name)
        raise type(error)(message) from error


@contextmanager
def _outer_causes_in_one_line(status: int, folder: Path | None = None) -> Iterator[None]:
    """Context of a command: what the file system refuses ends it with a line; all else propagates."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS or error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}", status, folder)


@contextmanager
def failures_in_one_line(folder: Path | None = None) -> Iterator[None]:
    """Context of a run: failures that have a cause outside of llmrl end with their message; anything else propagates.

    Input that cannot be used, a `ValueError`, has the status 2; a run that failed 1. `folder` is the output folder of
    a run that can be resumed.
    """
    from llmrl.distributed.activity import HERE
    from llmrl.distributed.heartbeat import AnotherRankFailed
    from llmrl.distributed.watchdog import PhaseTimeout
    from llmrl.memory import describe_full_memory
    from llmrl.trainers.run import Stopped
    from llmrl.user_code import UserCodeFailure

    try:
        with _outer_causes_in_one_line(1, folder):
            yield
    except AnotherRankFailed as error:
        raise typer.Exit(1) from error
    except Stopped as stopped:
        _fail(stopped, stopped.status)
    except UserCodeFailure as error:
        _fail(describe_full_memory(error, HERE.phase) or error, 1, folder)
    except (Error, FloatingPointError, PhaseTimeout) as error:
        if isinstance(error, ValueError):
            _fail(error, 2)
        _fail(error, 1, folder)
    except (RuntimeError, MemoryError) as error:
        message = describe_full_memory(error, HERE.phase)
        if message is None:
            raise
        _fail(message, 1, folder)


def _fail(error: BaseException | str, status: int, folder: Path | None = None) -> NoReturn:
    """Ends the command with a message, and the way to resume where the folder of its run has a checkpoint."""
    print(f"error: {shown(str(error))}", file=sys.stderr)
    if folder is not None:
        from llmrl.trainers.checkpoint import list_checkpoints

        if list_checkpoints(folder / "checkpoints"):
            print(
                f"mend it; the same command, with run.resume=true if settings have changed, goes on from {folder}",
                file=sys.stderr,
            )
    if "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ:
        print("(What the launcher prints below says only that this process ended.)", file=sys.stderr)
    raise typer.Exit(status)


def _is_first_on_machine() -> bool:
    """Whether this process is the first on its machine, which prints what all of a launch find before they meet."""
    return os.environ.get("LOCAL_RANK", "0") in ("", "-1", "0")


def _check_output(output: Path | None) -> None:
    """Refuses a file that could not be written in the end."""
    if output is None:
        return
    if output.is_dir():
        raise SettingError(f"--output ({output}) is a folder; name a file in it")
    place = next(place for place in (output, *output.absolute().parents) if place.exists())
    if place != output and not place.is_dir():
        raise SettingError(f"--output ({output}) would be in {place}, which is a file; name another place")
    if not os.access(place, os.W_OK):
        raise SettingError(f"--output ({output}) cannot be written: {place} allows no writing; name another place")


def _write(output: Path, text: str) -> None:
    """A file of text. Where the system refuses it after all, the text is printed, so that it is not lost."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")
    except OSError as error:
        print(text)
        _fail(f"--output ({output}) cannot be written: {error.strerror}; what it was to hold is printed", 1)


def _earlier(file: Path) -> tuple[str, Any]:
    """The model of an earlier evaluation, and the evaluation that it wrote."""
    from llmrl.trainers.comparison import read_evaluation

    if not file.is_file():
        raise SettingError(f"--compare ({file}) is no file; write one with --output")
    try:
        match json.loads(file.read_text()):
            case {"model": str(model), **record}:
                return model, read_evaluation(record)
    except (ValueError, RecursionError):
        pass
    raise SettingError(f"--compare ({file}) does not hold what --output of llmrl evaluate writes; name such a file")


def _print_dry_run(config: Any, checked: Any) -> None:
    from llmrl.sizing import describe_memory
    from llmrl.wiring.precision import with_dtypes

    with bad_input_ends_with_status_2():
        config = with_dtypes(config)
        memory = describe_memory(config)
    if not _is_first_on_machine():
        return
    print(to_yaml(masked(to_dict(config))))
    print(config.plan(None if checked.rows is None else len(checked.rows)))
    print("\n".join([*memory, *checked.notes]))
    for what in checked.unchecked:
        print(f"not checked: {what}")


def _print_end(config: Any, changes: Sequence[Any]) -> None:
    """What a run that has come to its end says when it is started again."""
    if _is_first_on_machine():
        for change in changes:
            print(change.notice)
        print("Nothing is left to learn: this run has come to its end.")
        _print_results(config)


def _print_results(config: Any) -> None:
    print(f"The model is in {config.output_dir}/final, the metrics are in {config.output_dir}/metrics.jsonl.")
    _print_card(config.folder)


def _print_card(folder: Path) -> None:
    from llmrl.reports.report_card import print_report_card

    file = folder / "final" / "report_card.json"
    if (card := read_object(file)) is None:
        return
    print_report_card(card, _console())
    print(f"The report card is {file}.")


def _print_responses(prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> None:
    """Each prompt with its responses: as they are to a file or a pipe, control characters escaped on a terminal."""
    show = visible if sys.stdout.isatty() else str
    for prompt, texts in zip(prompts, responses, strict=True):
        for text in texts:
            print(show(f"> {prompt}\n{text}\n"))


def _print_episodes(rollout: Any) -> None:
    """Each episode, as `_print_responses` prints responses."""
    from llmrl.reports.episodes import episode_text

    show = visible if sys.stdout.isatty() else str
    for row in range(len(rollout.rows)):
        print(show(f"{episode_text(rollout, row)}\n"))


def _compare(model: str, measured: Any, before: tuple[str, Any] | None) -> None:
    """Prints an evaluation, beside an earlier one if there is one: prompt by prompt where both are of the same."""
    from llmrl.trainers.comparison import NotPaired, paired_differences

    if before is None:
        _print_evaluation(model, measured.values, None)
        return
    earlier, then = before
    values = {"model": earlier, **then.values}
    try:
        differences = paired_differences(measured, then)
    except NotPaired as reason:
        _print_evaluation(model, measured.values, values)
        print(f"Not compared prompt by prompt: {reason}.")
        return
    _print_evaluation(model, measured.values, values, differences)
    print("The difference is the mean over prompts, with the 95 % interval of paired differences.")


def _print_evaluation(
    model: str,
    values: dict[str, float],
    before: dict[str, Any] | None,
    differences: Mapping[str, tuple[float, float, float]] | None = None,
) -> None:
    columns = map(shown, ["", *([before["model"]] if before else []), model, *(["difference"] if differences else [])])
    table = Table(*(Column(Text(column), overflow="fold") for column in columns))
    for name in without_ends(values):
        cells = [_cell(name, before)] if before else []
        gaps = [_difference(differences.get(name))] if differences else []
        table.add_row(Text(shown(name.removeprefix("eval/"))), *cells, _cell(name, values), *gaps)
    _console().print(table)


def _console() -> Console:
    """Where tables are printed: as wide as the terminal, and in a file or a pipe as what stands in them."""
    is_bounded = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if is_bounded else UNBOUNDED)


def _difference(interval: tuple[float, float, float] | None) -> str:
    return "" if interval is None else "{:+.4g}  [{:.4g}, {:.4g}]".format(*interval)


def _cell(name: str, values: dict[str, Any]) -> str:
    return with_interval(name, values, gap="  ") if name in values else ""
