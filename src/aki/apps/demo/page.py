"""The web page, in Gradio: ask about a picture, click a word, see what looked where."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from aki.apps.demo.reading import Reader, opened, overlays
from aki.data.digits import DigitScenes
from aki.models.explain import Explanation
from aki.models.rule import base_model
from aki.plots import Part

STYLE = (Path(__file__).parent / "page.css").read_text()
SCRIPT = (Path(__file__).parent / "page.js").read_text()
THEME = gr.themes.Default(
    primary_hue="orange", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)
"""Fonts of the system: the page asks nothing of other hosts."""
MAX_FILE_SIZE = "20mb"
HINT = "Click a word to see what looked where."
AVERAGE = "mean of all"


class Page:
    """The page's parts, and what happens between them."""

    def __init__(self, reader: Reader):
        self.reader = reader
        self.folder = tempfile.TemporaryDirectory(prefix="aki-demo-")
        # Gradio's own folder is shared by all pages of the machine, and one that ends takes equal pictures along.
        os.environ["GRADIO_TEMP_DIR"] = self.folder.name
        self.blocks = gr.Blocks(analytics_enabled=False, title="AKI: what the image read", delete_cache=(3600, 3600))
        with self.blocks:
            gr.Markdown(f"# What the image read\n{_about(reader)}")
            self.readings = gr.State(None)
            with gr.Row():
                with gr.Column(min_width=280):
                    self.add_question()
                with gr.Column(min_width=280):
                    self.add_answer()
                    with gr.Row():
                        self.shown = [self.add_overlay(rule) for rule in reader.rules]
            self.connect()

    def add_question(self) -> None:
        self.picture = gr.Image(
            type="filepath",
            image_mode=None,
            sources=["upload", "clipboard"],
            label="Picture (drop, paste or click)",
            height=300,
            buttons=[],
            elem_id="picture",
        )
        # The file as it is: what cannot be read gets our sentence, not Gradio's exception.
        self.picture.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
        self.question = gr.Textbox(label="Question", max_length=4000, lines=1, elem_id="question")
        self.ask = gr.Button("Ask", variant="primary", elem_id="ask")
        gr.Markdown("Or try:")
        self.examples = []
        for path, question in example_questions(self.reader, Path(self.folder.name)):
            button = gr.Button(question, icon=path, size="sm", variant="secondary", elem_classes="example")
            self.examples.append((button, path, question))

    def add_answer(self) -> None:
        self.message = gr.Markdown(visible=False, elem_id="message")
        with gr.Row():
            self.answers = [
                gr.Textbox(label=f"Answer ({rule})", interactive=False, min_width=140, elem_id=f"answer-{rule}")
                for rule in self.reader.rules
            ]
        self.hint = gr.Markdown(visible=False, elem_id="hint")
        self.question_words = gr.Radio(
            label="Question: where the picture attends to this word", visible=False, elem_id="question-words"
        )
        self.answer_words = gr.Radio(label="Answer: where this word looked", visible=False, elem_id="answer-words")
        self.layer = gr.Dropdown([AVERAGE], value=AVERAGE, label="Layer", visible=False, elem_id="layer")

    def add_overlay(self, rule: str) -> tuple[gr.Image, gr.Markdown]:
        with gr.Column(min_width=140):
            image = gr.Image(
                label=f"What the picture read by the rule {rule}",
                show_label=False,
                interactive=False,
                visible=False,
                buttons=[],
                format="png",
                elem_id=f"overlay-{rule}",
                elem_classes="overlay",
            )
            caption = gr.Markdown(visible=False, elem_id=f"caption-{rule}")
        return image, caption

    def connect(self) -> None:
        figures = [part for pair in self.shown for part in pair]
        results = [
            self.message,
            *self.answers,
            self.readings,
            self.hint,
            self.question_words,
            self.answer_words,
            self.layer,
            *figures,
        ]
        options: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        # Otherwise Gradio drops what is clicked while the click before is answered.
        options |= {"trigger_mode": "always_last"}
        gr.on(
            [self.ask.click, self.question.submit],
            self.read,
            [self.picture, self.question],
            results,
            concurrency_limit=1,
            **options,
        )
        gr.on([self.picture.upload, self.picture.clear], self.check, self.picture, results, **options)
        for button, path, question in self.examples:
            button.click(_constant(path, question), None, [self.picture, self.question], **options).then(
                self.read, [self.picture, self.question], results, concurrency_limit=1, **options
            )
        words: dict[Part, tuple[gr.Radio, gr.Radio]] = {
            "question": (self.question_words, self.answer_words),
            "answer": (self.answer_words, self.question_words),
        }
        for part, (own, other) in words.items():
            own.input(_drawing(part), [self.readings, own, self.layer], figures, **options)
            own.input(_constant(None), None, other, **options)
        self.layer.input(
            draw_chosen, [self.readings, self.question_words, self.answer_words, self.layer], figures, **options
        )

    def check(self, source: str | None) -> list[Any]:
        """A new picture: say at once if it cannot be read, and take old results away."""
        try:
            if source is not None:
                opened(source)
        except ValueError as error:
            return self.result(message=str(error))
        return self.result()

    def read(self, source: str | None, question: str) -> Iterator[list[Any]]:
        answer = ""
        try:
            picture = opened(source)
            yield self.result(answer="…")
            for answer, explanations, why_none in self.reader.read(picture, question):
                yield self.result(answer, explanations, why_none)
        except (ValueError, RuntimeError) as error:
            yield self.result(answer, message=str(error))

    def result(self, answer: str = "", explanations: list[Explanation] | None = None, message: str = "") -> list[Any]:
        """Values for all that depends on a question; `answer` is by the model's own rule."""
        own = explanations[-1] if explanations else None
        others = [e.answer for e in explanations[:-1]] if explanations else [""] * (len(self.answers) - 1)
        layers = [] if own is None else [(f"{i + 1}", i) for i in range(len(own.question_maps))]
        return [
            gr.update(value=f"⚠ {escape(message)}" if message else "", visible=bool(message)),
            *others,
            answer,
            explanations or None,
            gr.update(value=HINT, visible=own is not None),
            _radio(own.question_words if own else []),
            _radio(own.answer_words if own else []),
            gr.update(choices=[AVERAGE, *layers], value=AVERAGE, visible=own is not None),
            # Hidden when a question is asked; Gradio repeats the last result at its end, when a word may be chosen.
            *[gr.update(visible=False) if own is None else gr.skip()] * (2 * len(self.shown)),
        ]


def draw(explanations: list[Explanation] | None, part: Part, word: int | None, layer: int | str) -> list[Any]:
    """Values for the pictures and their captions when a word is clicked."""
    if not explanations or word is None:
        return [gr.skip()] * (2 * len(explanations or [0, 0]))
    chosen = None if layer == AVERAGE else int(layer)
    return [
        update
        for image, caption in overlays(explanations, part, word, chosen)
        for update in (gr.update(value=image, visible=True), gr.update(value=caption, visible=True))
    ]


def draw_chosen(
    explanations: list[Explanation] | None, question_word: int | None, answer_word: int | None, layer: Any
) -> list[Any]:
    part: Part = "question" if answer_word is None else "answer"
    return draw(explanations, part, question_word if answer_word is None else answer_word, layer)


def _drawing(part: Part) -> Callable[[Any, Any, Any], list[Any]]:
    return lambda explanations, word, layer: draw(explanations, part, word, layer)


def _constant(*values: Any) -> Callable[[], Any]:
    return lambda: values[0] if len(values) == 1 else list(values)


def _radio(words: list[str]) -> Any:
    return gr.update(choices=[(word, i) for i, word in enumerate(words)], value=None, visible=bool(words))


def _about(reader: Reader) -> str:
    name = "/".join(Path(reader.model.name_or_path).parts[-2:]) or "a model"
    return f"Ask `{name}` about a picture. Its attention rule is `{reader.own_rule}`."


def example_questions(reader: Reader, folder: Path) -> list[tuple[str, str]]:
    """Pictures of handwritten digits that no model was trained on, written to a folder, and a question for each."""
    config = base_model(reader.model).config
    side = min(384, config.image_size[0] if config.model_type == "aki" else 384)
    scenes = DigitScenes("test", "question", 3, side, seed=8, skills=("count_colour", "exists", "read"))
    found = []
    for i, sample in enumerate(scenes[index] for index in range(3)):
        path = folder / f"example-{i}.png"
        sample.messages[0]["content"][0]["image"].save(path)
        found.append((str(path), sample.question))
    return found


def serve(
    model: Any, processor: Any, host: str, port: int | None, max_new_tokens: int, block: bool = True
) -> gr.Blocks:
    """Show the page until Ctrl-C, or, without `block`, until `close()` of what is returned.

    Raises:
        OSError: the port cannot be had.
    """
    page = Page(Reader(model, processor, max_new_tokens))
    page.blocks.queue(max_size=32)
    try:
        page.blocks.launch(
            server_name=host,
            server_port=port,
            share=False,
            ssr_mode=False,
            quiet=True,
            max_file_size=MAX_FILE_SIZE,
            allowed_paths=[page.folder.name],
            state_session_capacity=200,
            footer_links=[],
            theme=THEME,
            css=STYLE,
            js=SCRIPT,
            prevent_thread_lock=True,
        )
    except (OSError, OverflowError) as error:
        raise OSError(f"port {port} of {host} cannot be had: choose another with --port.") from error
    print(f"{page.blocks.local_url} (Ctrl-C ends it)", flush=True)
    if block:
        page.blocks.block_thread()
    return page.blocks
