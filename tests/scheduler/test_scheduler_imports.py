import subprocess
import sys
from pathlib import Path

PYTHON_FOLDER = Path(__file__).resolve().parents[2] / "python"


def test_the_scheduler_is_standard_library_only():
    """Neither NumPy, nor torch, nor the extension, nor the runtime that holds it."""
    code = (
        "import sys; before = set(sys.modules); import scheduler, scheduler.policy, scheduler.composer;"
        "import scheduler.cost_model, scheduler.simulator.command;"
        "import scheduler.simulator.plots, scheduler.simulator.recording;"
        "roots = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(roots - set(sys.stdlib_module_names)))"
    )
    # -S: what site-packages would import at start is not the scheduler's doing.
    command = [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(PYTHON_FOLDER)!r}); {code}"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['scheduler']"
