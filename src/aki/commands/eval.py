"""`aki eval`."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from aki.commands.shared import TakesPlugins


@dataclass
class Eval(TakesPlugins):
    """Score a model: with lmms-eval, or on questions of your own (--recipe or --data). A second call goes on where the
    first was cut off.

    Several GPUs: `torchrun --nproc-per-node 8 -m aki eval ...`. The judged benchmarks take lmms-eval's settings:
    OPENAI_API_KEY, OPENAI_API_URL, MODEL_VERSION.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A folder or a hub id; models that are not AKI are scored too."""
    suite: Literal["paper", "digits"] = "paper"
    """The paper's twelve columns, or DigitScenes by skill."""
    tasks: tuple[str, ...] = ()
    """Of the suite, by lmms-eval's names; all by default."""
    output: Path | None = None
    """Where results.json and the answers go; by default runs/eval/ and the model's name."""
    name: str | None = None
    """The row's name in tables; by default the model's."""
    data: Path | None = None
    """A folder with copies of the data sets by their hub paths, for machines without the hub; or a file of your own
    questions: chats (.jsonl), LLaVA's JSON, or a table (.csv, .parquet) with columns image, question, answer."""
    images: Path | None = None
    """The folder of the pictures of such a file; its own if absent."""
    recipe: Path | None = None
    """Ask what this recipe holds out (data.held_out) for the final numbers."""
    metric: Literal["exact", "vqa", "anls", "relaxed"] = "exact"
    """How answers to your own questions are scored: VQA's, ANLS, or ChartQA's relaxed accuracy (numbers within 5 %)."""
    batch_size: int = 16
    """Prompts at a time, on each device."""
    dtype: str = "auto"
    """A torch dtype; auto is the checkpoint's."""
    rule: str | None = None
    """An attention rule instead of the checkpoint's."""
    unlock: bool = False
    """Lay the rule (or mma) over a model that is not AKI."""
    backend: str | None = None
    """What computes attention: auto, segments, sdpa or eager."""
    engine: Literal["aki", "vllm"] = "aki"
    """vllm: lmms-eval's own model of that name, where vLLM is installed."""
    limit: int | None = None
    """Rows of each task, for a trial."""
    limit_new_tokens: int | None = None
    """No answer is longer, whatever a task allows; 64 tokens for your own questions."""
    seed: int = 1234
    """Of lmms-eval's random numbers."""

    def run(self, rest: list[str]) -> None:
        for option, count in (
            ("limit", self.limit),
            ("limit-new-tokens", self.limit_new_tokens),
            ("batch-size", self.batch_size),
        ):
            if count is not None and count < 1:
                raise ValueError(f"--{option} must be at least 1, it is {count}.")
        if self.recipe is not None or (self.data is not None and self.data.is_file()):
            self._ask_own()
            return
        if find_spec("lmms_eval") is None:
            raise ValueError("aki eval needs lmms-eval: pip install 'aki-mma[eval]'.")
        if self.engine == "vllm" and (self.backend is not None or self.limit_new_tokens is not None):
            raise ValueError("--backend and --limit-new-tokens are aki's own engine's: leave them out with vllm.")
        from aki.evaluation.suite import columns
        from aki.files import alone

        columns(self.suite, self.tasks)  # says what is no task
        name = self.name or Path(self.model).resolve().name
        output = self.output or Path("runs/eval") / name
        # torchrun ends the others when the first is refused.
        first = int(os.environ.get("RANK", 0)) == 0
        with alone(output / "lock", f"the output folder {output}") if first else nullcontext():
            self._evaluate(name, output)

    def _ask_own(self) -> None:
        from aki.commands.shared import read_recipe
        from aki.evaluation import own
        from aki.evaluation.opening import load_model
        from aki.files import alone

        if self.engine == "vllm" or self.tasks or (self.recipe is not None and self.data is not None):
            raise ValueError(
                "your own questions are --recipe or --data, asked by aki's own engine: leave --tasks, --engine vllm "
                "and the other of the two out."
            )
        recipe = None if self.recipe is None else read_recipe(self.recipe, [])
        name = self.name or Path(self.model).resolve().name
        output = self.output or Path("runs/eval") / f"{name}-own"
        with alone(output / "lock", f"the output folder {output}"):
            model, processor = load_model(self.model, self.dtype, self.rule, self.unlock, self.backend)
            collator = own.collator_of(processor, recipe)
            asked: Any = recipe if recipe is not None else [own.source_of(self.data, self.images)]  # type: ignore[arg-type]
            samples, report = own.questions_of(asked, collator, self.limit)
            settings = {
                "name": name,
                "model": self.model,
                "rule": getattr(model.config, "attention_rule", None) or "causal",
                "metric": self.metric,
                "batch_size": self.batch_size,
                "max_new_tokens": self.limit_new_tokens or 64,
            }
            results = own.measure(own.on_its_device(model), collator, samples, output, settings, report)
        print(f"\n{own.own_table([results])}\n")
        if report is not None and report.skipped:
            print(f"Not asked: {report.summary()}.")
        print(f"Each answer: {output}/predictions.jsonl. Beside others: aki table {output} ...")

    def _evaluate(self, name: str, output: Path) -> None:
        from aki.evaluation.lmms import Aki
        from aki.evaluation.run import Evaluation, evaluate
        from aki.evaluation.suite import columns
        from aki.evaluation.tables import summary

        data = self.data
        if self.suite == "digits":
            from accelerate import PartialState

            from aki.evaluation.digit_data import held_out, write_scenes

            data = output / "data"
            if PartialState().is_main_process:
                write_scenes(held_out(Path(self.model)), data / "DigitScenes")
            PartialState().wait_for_everyone()
        rule = self.rule or ("mma" if self.unlock else None)
        model = (
            self._in_vllm(rule)
            if self.engine == "vllm"
            else Aki(
                self.model,
                batch_size=self.batch_size,
                dtype=self.dtype,
                rule=self.rule,
                unlock=self.unlock,
                backend=self.backend,
                answers=output / "answers",
                limit_new_tokens=self.limit_new_tokens,
            )
        )
        evaluation = Evaluation(self.suite, columns(self.suite, self.tasks), output, data, self.limit, self.seed)
        results = evaluate(evaluation, model, name)
        if results is not None:
            beside = f"; beside the paper's: aki table {output}" if self.suite == "paper" else ""
            print(f"\n{summary(results)}\n\n{output}/results.json{beside}")

    def _in_vllm(self, rule: str | None) -> Any:
        from aki.apps.vllm import check_installed

        check_installed()
        from aki.evaluation.vllm import Vllm

        return Vllm(self.model, rule, self.dtype, self.batch_size)
