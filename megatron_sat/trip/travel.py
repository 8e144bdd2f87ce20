"""A trip made: what can be done at once is, but training runs are alone on the machine, since their time counts."""

import shlex

from megatron_sat.compare.runs import Run, read_run, steps_that_fit
from megatron_sat.compare.stages import Runner, Stage
from megatron_sat.log import say
from megatron_sat.trip.course import CONTROL, DENSE, SAT, Course


def travel(course: Course, runner: Runner) -> list[Stage]:
    """Run every stage that is not done; returns all of them in the order of the trip.

    Raises what `Runner.run` raises; what is done then stays done.
    """
    first = [*course.before, course.original, course.vocabulary, course.imported, course.tokens, course.extended]
    runner.run_all(first)
    runner.run(course.dense)
    runner.run(course.sat)
    control = course.control(steps=fitting_steps(course))
    runner.run(control)
    last = [course.export, *(course.trained(run) for run in (course.sat, course.dense, control)), course.exported]
    runner.run_all(last)
    return [*first, course.dense, course.sat, control, *last]


def fitting_steps(course: Course) -> int:
    """The control's steps: as many of the dense run's as fit into SAT's training time."""
    dense, sat = runs_of(course)
    return steps_that_fit(dense, seconds=sat.seconds)


def runs_of(course: Course) -> tuple[Run, Run]:
    """Dense and SAT as they recorded themselves."""
    return read_run(course.dense.folder, name=DENSE), read_run(course.sat.folder, name=SAT)


def rehearse(course: Course) -> None:
    """Say every command, in order, and run none."""
    stages = [*course.before, course.original, course.vocabulary, course.imported, course.tokens, course.extended]
    stages += [course.dense, course.sat, course.control(steps=course.settings.steps)]
    stages += [course.export, course.trained(course.sat), course.trained(course.dense)]
    stages += [course.trained(course.control(steps=course.settings.steps)), course.exported]
    for stage in stages:
        say(f"{stage.name}: {shlex.join(stage.command)}")
    say(f"{CONTROL}'s --train-iters follow from the time that SAT takes; {course.settings.steps} stand for them here")
