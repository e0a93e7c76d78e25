"""What a run may not touch is said before anything expensive is done."""

import stat

import pytest

from palimpsest.artifacts import RunFolder, check_claim
from palimpsest.errors import ArtifactError


def make(path, *, finish):
    with RunFolder(path, stage="audit", config={"k": 5}) as run:
        run.write_json("a.json", {})
        if finish:
            run.finish()


@pytest.mark.parametrize("finish", [True, False])
def test_an_earlier_run_is_refused_unless_the_user_decides(tmp_path, finish):
    make(tmp_path / "run", finish=finish)
    with pytest.raises(ArtifactError, match="already holds") as caught:
        check_claim(tmp_path / "run")
    assert ("--resume" in str(caught.value)) is not finish
    before = sorted(tmp_path.rglob("*"))
    for decision in ({"resume": True}, {"overwrite": True}):
        check_claim(tmp_path / "run", **decision)
    assert sorted(tmp_path.rglob("*")) == before


def test_new_and_empty_folders_are_free(tmp_path):
    check_claim(tmp_path / "new")
    check_claim(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_foreign_folders_and_runs_in_progress_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ArtifactError, match="no artifact"):
        check_claim(tmp_path / "mine", overwrite=True)
    with (
        RunFolder(tmp_path / "run", stage="audit", config={}),
        pytest.raises(ArtifactError, match="another run"),
    ):
        check_claim(tmp_path / "run", resume=True)
    check_claim(tmp_path / "run", resume=True)


def test_written_files_are_as_readable_as_other_new_files(tmp_path):
    with RunFolder(tmp_path / "run", stage="audit", config={}) as run, run.writing("w.bin") as temporary:
        temporary.write_bytes(b"x")
        temporary.chmod(0o600)
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE((tmp_path / "run" / "w.bin").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
