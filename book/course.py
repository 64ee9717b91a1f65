"""The labs as a course with nbgrader: set one up, or try the whole round with three made-up hand-ins.

python book/course.py new FOLDER [LAB ...]     a course of these labs (default: all), ready to hand out
python book/course.py try FOLDER [LAB]         hands a lab out, hands it in three times, and grades it
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LABS = ["gradients", "perturbation", "layer_gradcam", "lime", "write_it_yourself"]
#: Who hands in, and which share of the tasks they have solved.
HAND_INS = {"right": 1.0, "half": 0.5, "untouched": 0.0}


def nbgrader(folder, *arguments):
    """Run nbgrader in a course.

    Raises:
        RuntimeError: it failed, with what it printed last.
    """
    command = [sys.executable, "-m", "nbgrader", *arguments]
    # It calls programs that were installed beside it.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("MPLBACKEND", None)  # notebooks choose their own
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nbgrader {' '.join(arguments)} failed:\n{(done.stdout + done.stderr)[-3000:]}")


def new_course(folder, labs=LABS):
    """Set up a course: settings, the labs with their solutions in source/, and what students get in release/.

    Raises:
        FileExistsError: there is something in the folder.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: give the course a folder of its own")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "book" / "nbgrader_config.py", folder)
    for lab in labs:
        (folder / "source" / lab).mkdir(parents=True)
        shutil.copy(ROOT / "notebooks" / "labs" / f"{lab}.ipynb", folder / "source" / lab)
        nbgrader(folder, "generate_assignment", lab)


def role(cell):
    return cell["metadata"].get("nbgrader", {})


def hand_in(folder, lab, student, share):
    """Hand in what was released, with the first share of the tasks solved as the source solves them."""
    parts = (folder / part / lab / f"{lab}.ipynb" for part in ("source", "release"))
    source, released = (json.loads(part.read_text(encoding="utf-8")) for part in parts)
    solutions = {role(cell)["grade_id"]: cell["source"] for cell in source["cells"] if role(cell).get("solution")}
    solved = list(solutions)[: int(share * len(solutions))]
    for cell in released["cells"]:
        if role(cell).get("grade_id") in solved:
            cell["source"] = solutions[role(cell)["grade_id"]]
    target = folder / "submitted" / student / lab
    target.mkdir(parents=True)
    (target / f"{lab}.ipynb").write_text(json.dumps(released), encoding="utf-8")


def marks(folder, lab):
    """What each student got, and could get: {student: (marks, of how many)}."""
    nbgrader(folder, "export", "--to", "marks.csv")
    with open(folder / "marks.csv", newline="") as table:
        rows = [row for row in csv.DictReader(table) if row["assignment"] == lab]
    return {row["student_id"]: (float(row["score"]), float(row["max_score"])) for row in rows}


def try_out(folder, lab="layer_gradcam"):
    """The whole round in a new course; returns its `marks`."""
    new_course(folder, [lab])
    for student, share in HAND_INS.items():
        hand_in(folder, lab, student, share)
    nbgrader(folder, "autograde", lab, "--create")
    return marks(folder, lab)


def main(command="", folder="", *labs):
    if command not in ("new", "try") or not folder or set(labs) - set(LABS) or (command == "try" and len(labs) > 1):
        sys.exit(f"{__doc__}\nLABs: {', '.join(LABS)}")
    folder = Path(folder).expanduser().resolve()
    if command == "new":
        new_course(folder, labs or LABS)
        print(f"{folder}/release has what students get, {folder}/source the solutions.")
    else:
        for student, (got, most) in try_out(folder, *labs).items():
            print(f"{student:10} {got:g} of {most:g}")


if __name__ == "__main__":
    main(*sys.argv[1:])
