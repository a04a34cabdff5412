"""The tasks by name."""

from __future__ import annotations

from millrace.errors import UserError
from millrace.tasks import arithmetic, chat, instructions, policy
from millrace.tasks.items import Grade, Item, Split, Task

TASKS: dict[str, Task] = {
    task.name: task for task in (policy.TASK, arithmetic.TASK, chat.TASK, instructions.TASK)
}

__all__ = ["TASKS", "Grade", "Item", "Split", "Task", "find_task", "make_items"]


def find_task(name: str) -> Task:
    if name not in TASKS:
        raise UserError(f"task {name!r} is unknown; there are {', '.join(TASKS)}")
    return TASKS[name]


def make_items(name: str, count: int, seed: int, split: Split = "heldout") -> list[Item]:
    """The first `count` items of a task; a longer list starts with the shorter one."""
    task = find_task(name)
    return [task.make(index, seed, split) for index in range(count)]
