"""A reward of the next state that is learned from labels, in classic tasks whose dynamics may change afterwards."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.options import require_choices
from bilevel_jax.core.saving import read_final
from bilevel_jax.environments import Continuing, Environment, Rewarded
from bilevel_jax.environments.classic import Acrobot, CartPole, GridWalk, MountainCar
from bilevel_jax.mdp.regularizers import ShannonEntropy
from bilevel_jax.networks import MLP, Ensemble, RewardNetwork, Scaled
from bilevel_jax.preferences import PreferenceProblem, ScriptedTeacher
from bilevel_jax.problems.options import MOST_STEPS, MOST_WIDTH, as_positive, refuse_unused, require_size
from bilevel_jax.problems.registry import register
from bilevel_jax.problems.simulators import of_gymnax

MOST_MEMBERS = 100


@dataclasses.dataclass(frozen=True)
class PreferenceLearningOptions:
    """A reward learned from preferences, for an agent in classic control or on a map, under usual or changed dynamics.

    task: "cart_pole", "acrobot", "mountain_car" or "four_rooms". None ever ends: after a fall or at the goal, the next
      step leads to a new start. The true reward is a function of the next state that the learner does not see.
    dynamics: "usual", or a change of gravity, lengths, masses or walls: "mild", "heavy", "other" or "reversed"; see
      `preference_learning.TASKS`.
    gymnax: the name of an environment of gymnax instead, such as "Breakout-MinAtar", whose own rewards are the true
      ones. Where a game ends, the next step leads to a new one. It needs the extra gymnax, and only has the usual
      dynamics.
    inputs: what the learned reward depends on, the "next_state", the "state", or "state_action".
    members: networks of an ensemble, whose mean is the reward.
    width: of the hidden layers of the reward.
    scale: of the reward; parameters move less where it is large.
    temperature: of the agent's entropy, in units of the reward.
    discount: of the agent; None is the task's own.
    length: steps of a segment.
    horizon: steps of an episode, when agents are evaluated; 0 is the task's own.
    rationality: of the teacher in the loss of algorithms that have no labels of their own.
    true_reward: the agent earns the true reward, and x has no effect: with `agent_alone` the most that can be learned.
    saved: the final.npz of a finished run, whose learned reward is the start; with `agent_alone` an agent is trained on
      it. The network's options are those of that run, the dynamics may be others.
    saved_run: the place of the run in that file.
    """

    task: Literal["cart_pole", "acrobot", "mountain_car", "four_rooms"] = "cart_pole"
    dynamics: Literal["usual", "mild", "heavy", "other", "reversed"] = "usual"
    gymnax: str = ""
    inputs: Literal["state", "next_state", "state_action"] = "next_state"
    members: int = 1
    width: int = 64
    scale: float = 2.0
    temperature: float = 0.05
    discount: float | None = None
    length: int = 10
    horizon: int = 0
    rationality: float = 10.0
    true_reward: bool = False
    saved: str = dataclasses.field(default="", metadata={"path": True})
    saved_run: int = 0


class Usual(NamedTuple):
    """The numbers of an agent's task: `scale` and `offset` bring observations to the order of one."""

    scale: tuple[float, ...]
    offset: tuple[float, ...]
    discount: float
    horizon: int


class Task(NamedTuple):
    """What is particular to a task: the fields of `Usual`, and how the environment is made.

    `build` makes the environment from its physics. `reward` is the true reward, of a step. `dynamics` has the physics
    by name.
    """

    build: Callable[..., Environment]
    reward: Callable[[Any, Any, Any], Any]
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    discount: float
    horizon: int
    dynamics: Mapping[str, dict[str, Any]]


def _upright_near_one(observation: Any, action: Any, after: Any) -> Any:
    """0.1 (1 - |x - 1| / 2), and -0.5 for a fall: be upright one metre to the right."""
    del observation, action
    fallen = (jnp.abs(after[0]) > 2.4) | (jnp.abs(after[2]) > 12 * np.pi / 180)
    return 0.1 * (1 - jnp.abs(after[0] - 1) / 2 - 5 * fallen.astype(after.dtype))


def _high(observation: Any, action: Any, after: Any) -> Any:
    """0.05 times the height of the tip, from -2 to 2, less 0.1, and 1 above the line."""
    del observation, action
    height = -after[0] - (after[0] * after[2] - after[1] * after[3])
    return 0.1 * (height / 2 - 1) + (height > 1).astype(after.dtype)


def _over_the_hill(observation: Any, action: Any, after: Any) -> Any:
    """The height of the car, from -0.1 to 0, and 1 at the goal."""
    del observation, action
    return 0.05 * (jnp.sin(3 * after[0]) - 1) + (after[0] >= 0.5).astype(after.dtype)


def _goal_without_a_room(observation: Any, action: Any, after: Any) -> Any:
    """0.3 in nine cells around a goal, down on the right, and -0.2 in the room above it."""
    del observation, action
    goal = jnp.all(jnp.abs(after - jnp.asarray([0.8, 0.6], after.dtype)) < 0.3)
    room = (after[0] < 0.15) & (after[1] > 0.1)
    return 0.3 * goal.astype(after.dtype) - 0.2 * room.astype(after.dtype)


def _rooms(**doors: tuple[tuple[int, int], ...]) -> Environment:
    """Four rooms with doors at some cells, or those of `GridWalk`."""
    if not doors:
        return GridWalk()
    walls = np.zeros((11, 11), bool)
    walls[:, 5] = True
    walls[5, :5] = walls[6, 6:] = True
    for row, column in doors["doors"]:
        walls[row, column] = False
    return GridWalk(walls)


TASKS = {
    "cart_pole": Task(
        lambda **physics: Continuing(CartPole(interval=0.04, **physics)),
        _upright_near_one,
        scale=(1.0, 1.0, 0.1, 1.0),
        offset=(0.0, 0.0, 0.0, 0.0),
        discount=0.97,
        horizon=200,
        dynamics={
            "usual": {},
            "mild": {"gravity": 14.7, "half_length": 1.0, "force": 6.0},
            "heavy": {"gravity": 20.0, "half_length": 2.0, "force": 5.0},
            "other": {"gravity": -9.8},
            "reversed": {"force": -10.0},
        },
    ),
    "acrobot": Task(
        lambda **physics: Continuing(Acrobot(**physics)),
        _high,
        scale=(1.0, 1.0, 1.0, 1.0, 3.0, 6.0),
        offset=(0.0,) * 6,
        discount=0.98,
        horizon=200,
        dynamics={
            "usual": {},
            "mild": {"masses": (1.0, 1.3)},
            "heavy": {"masses": (1.0, 2.0), "torque": 1.5},
            "other": {"lengths": (1.0, 0.5), "gravity": 6.0},
            "reversed": {"torque": -1.0},
        },
    ),
    "mountain_car": Task(
        lambda **physics: Continuing(MountainCar(**physics)),
        _over_the_hill,
        scale=(0.5, 0.03),
        offset=(-0.3, 0.0),
        discount=0.99,
        horizon=400,
        dynamics={
            "usual": {},
            "mild": {"gravity": 0.003},
            "heavy": {"gravity": 0.004, "force": 0.0014},
            "other": {"gravity": 0.0012, "force": 0.0006},
            "reversed": {"force": -0.001},
        },
    ),
    "four_rooms": Task(
        _rooms,
        _goal_without_a_room,
        scale=(0.2, 0.2),
        offset=(0.0, 0.0),
        discount=0.97,
        horizon=60,
        dynamics={
            "usual": {},
            "mild": {"doors": ((1, 5), (9, 5), (5, 1), (6, 8))},
            "heavy": {"doors": ((2, 5), (7, 5), (5, 4))},
            "other": {"doors": ((4, 5), (8, 5), (5, 3), (6, 10))},
            "reversed": {"doors": ((2, 5), (5, 1), (6, 6))},
        },
    ),
}
"""What is particular to each task, by name."""


# Observations of MinAtar are 0 or 1.
GAME = Usual(scale=(1.0,), offset=(0.0,), discount=0.99, horizon=500)


def environment(task: str, dynamics: str = "usual") -> Environment:
    """The environment of a task under some dynamics; it emits the true reward.

    Example:
      >>> bj.problems.preference_learning.environment("four_rooms", "heavy").num_actions
      4
    """
    own = TASKS[task]
    return Rewarded(own.build(**own.dynamics[dynamics]), own.reward)


def _build(options: PreferenceLearningOptions) -> PreferenceProblem:
    require_choices(options)
    if options.gymnax != "":
        refuse_unused(options, ("task", "dynamics"), "has no effect where gymnax names the environment")
        own, simulator = GAME, Continuing(of_gymnax(options.gymnax))
    else:
        own, simulator = TASKS[options.task], environment(options.task, options.dynamics)
    require_size(options, "width", most=MOST_WIDTH)
    require_size(options, "members", most=MOST_MEMBERS)
    require_size(options, "length", most=MOST_STEPS)
    require_size(options, "horizon", least=0, most=MOST_STEPS)
    require_size(options, "saved_run", least=0)
    scale = as_positive(options, "scale", "2 is usual")
    network = Scaled(own.scale, own.offset, MLP(options.width, layer_norm=False, activation="silu"))
    model: Any = RewardNetwork.of(simulator, network, options.inputs, scale=scale)
    model = model if options.members == 1 else Ensemble(model, options.members)
    problem = PreferenceProblem(
        simulator,
        model,
        teacher=ScriptedTeacher.boltzmann(options.rationality),
        regularizer=ShannonEntropy(options.temperature),
        discount=own.discount if options.discount is None else options.discount,
        length=options.length,
        horizon=options.horizon or own.horizon,
        centred=True,
    )
    if options.true_reward:
        refuse_unused(options, ("saved",), "has no effect where the agent earns the true reward")
        return problem.with_true_reward()
    if not options.saved:
        return problem
    like = jax.eval_shape(problem.start, jax.random.key(0))
    try:
        x = read_final(options.saved, "x", like, options.saved_run)
    except OSError as error:
        raise InputError(f"saved: {options.saved} cannot be read ({error}); give the final.npz of a run") from None
    except InputError as error:
        raise InputError(f"saved: {error}") from None
    return problem.starting_at(x)


register("preference_learning", PreferenceLearningOptions, _build)
