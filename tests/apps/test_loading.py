"""What a command says of a folder before anything is answered."""

from __future__ import annotations

import io
import json

import pytest
from transformers.utils.logging import enable_progress_bar

from aki.cli import main


def says(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, arguments)])
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("command", [["chat"], ["serve"]])
def test_a_folder_with_an_adapter_is_no_matter_of_the_network(command, tmp_path, capsys, monkeypatch):
    """Entry 26 of issue 12: it said "check your internet connection"."""
    monkeypatch.setattr("sys.stdin", io.StringIO("what?"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    said = says(capsys, *command, tmp_path)
    assert "holds an adapter alone, and its model, some/base, is not there" in said
    assert "internet" not in said


def test_a_folder_without_a_model(tmp_path, capsys):
    """Entry 26, of the kind."""
    said = says(capsys, "chat", tmp_path, "hi")
    assert "there is no config.json in it" in said
    assert "internet" not in said


def test_an_answer_comes_without_a_loading_bar(model_folder, scene, capfd):
    """Entry 26: standard error stays empty."""
    enable_progress_bar()  # other commands hide them for the whole process
    main(["chat", str(model_folder), "--image", str(scene), "--max-new-tokens", "2", "what?"])
    out, err = capfd.readouterr()
    assert out.strip()
    assert err == ""
