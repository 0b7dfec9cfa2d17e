"""Teachers that compare two segments by a reward, or by advantages, that the learner does not see."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, PRNGKeyArray, Real

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.promotion import with_rank
from bilevel_jax.core.validation import as_float, is_known, require_at_least, require_finite
from bilevel_jax.preferences.bradley_terry import FIRST, SECOND, TIE, gain_of, segment_return
from bilevel_jax.preferences.dataset import Preferences


class Judgement(NamedTuple):
    """What a teacher says of pairs: labels [...], 1 for the first, 1/2 for equal, 0 for the second, and whether it
    judged the pair or skipped it, [...]. The label of a skipped pair is 1/2.
    """

    label: Float[Array, "*batch"]
    judged: Bool[Array, "*batch"]


class Teacher(eqx.Module):
    """A noisily rational teacher with ties (Rao and Kupper 1967) who sometimes guesses (Lee et al. 2021, B-Pref).

    With d = return_1 - return_2, and with probability 1 - noise,
      P(first) = sigmoid(rationality (d - tie_threshold)),
      P(second) = sigmoid(-rationality (d + tie_threshold)),
    and a tie otherwise; with probability noise, a fair coin between first and second. A tie_threshold of
    0 makes it the Bradley-Terry model, which never ties. The rule is smooth: the higher the rationality,
    the closer it comes to a tie where |d| < tie_threshold and to the better segment elsewhere.

    Args:
      rationality: inverse temperature, at least 0, in units of 1 / reward.
      noise: probability that the label is a guess, in [0, 1].
      tie_threshold: returns closer than this are mostly declared a tie, at least 0.

    Raises:
      InputError: a value out of range (where it is known), or one that is no number.

    Example:
      >>> teacher = bj.preferences.Teacher(rationality=1.0, noise=0.0, tie_threshold=0.0)
      >>> float(teacher.mean_label(jnp.asarray(2.0), jnp.asarray(2.0)))
      0.5
    """

    rationality: Float[Array, ""]
    noise: Float[Array, ""]
    tie_threshold: Float[Array, ""]

    def __init__(
        self,
        rationality: Real[ArrayLike, ""] | Any = 1.0,
        noise: Real[ArrayLike, ""] | Any = 0.0,
        tie_threshold: Real[ArrayLike, ""] | Any = 0.0,
    ):
        self.rationality = _number("rationality", rationality, "0 is a teacher who always guesses")
        self.noise = _number("noise", noise, "0 is none, 1 guesses only")
        self.tie_threshold = _number("tie_threshold", tie_threshold, "0 never ties")
        if is_known(self.noise) and float(self.noise) > 1:
            raise InputError(f"noise must be at most 1, got {float(self.noise):g}; 0 is none, 1 guesses only")

    def probabilities(
        self, return_1: Real[ArrayLike, "*#batch"] | Any, return_2: Real[ArrayLike, "*#batch"] | Any
    ) -> Float[Array, "*batch 3"]:
        """Return the probabilities of the labels first, tie and second, [..., 3], from returns [...] under the
        teacher's reward.
        """
        gain = self._gain(return_1, return_2)
        rationality, noise, threshold = (leaf.astype(gain.dtype) for leaf in self._leaves())
        u, v = rationality * gain, rationality * threshold
        first, second = jax.nn.sigmoid(u - v), jax.nn.sigmoid(-u - v)
        # 1 - first - second, without cancellation
        tie = -jnp.expm1(-2 * v) * jax.nn.sigmoid(u + v) * jax.nn.sigmoid(v - u)
        considered = jnp.stack([first, tie, second], -1)
        return (1 - noise) * considered + noise * with_rank(jnp.array([0.5, 0, 0.5], gain.dtype), considered.ndim)

    def mean_label(
        self, return_1: Real[ArrayLike, "*#batch"] | Any, return_2: Real[ArrayLike, "*#batch"] | Any
    ) -> Float[Array, "*batch"]:
        """P(first) + P(tie) / 2, the expected label, [...]."""
        gain = self._gain(return_1, return_2)
        rationality, noise, threshold = (leaf.astype(gain.dtype) for leaf in self._leaves())
        u, v = rationality * gain, rationality * threshold
        considered = (jax.nn.sigmoid(u - v) + jax.nn.sigmoid(u + v)) / 2
        return (1 - noise) * considered + noise / 2

    def label(
        self, key: PRNGKeyArray, return_1: Real[ArrayLike, "*#batch"] | Any, return_2: Real[ArrayLike, "*#batch"] | Any
    ) -> Float[Array, "*batch"]:
        """Draw labels [...]: 1 for first, 1/2 for a tie, 0 for second."""
        probabilities = self.probabilities(return_1, return_2)
        number = jax.random.uniform(key, probabilities.shape[:-1], probabilities.dtype)
        first, tie = probabilities[..., 0], probabilities[..., 1]
        labels = jnp.array([FIRST, TIE, SECOND], probabilities.dtype)
        return jnp.where(number < first, labels[0], jnp.where(number < first + tie, labels[1], labels[2]))

    def judge(
        self,
        key: PRNGKeyArray,
        scores_1: Real[ArrayLike, "*#batch H"] | Any,
        scores_2: Real[ArrayLike, "*#batch H"] | Any,
        valid_1: Bool[ArrayLike, "*#batch H"] | Any = True,
        valid_2: Bool[ArrayLike, "*#batch H"] | Any = True,
    ) -> Judgement:
        """Label pairs by the sums of the scores of their valid steps, as `ScriptedTeacher.judge`; it skips none."""
        one, two = (segment_return(*_steps(*side)) for side in ((scores_1, valid_1), (scores_2, valid_2)))
        label = self.label(key, one, two)
        return Judgement(label, jnp.ones(label.shape, bool))

    def _gain(self, return_1: Any, return_2: Any) -> Float[Array, "*batch"]:
        return gain_of(return_1, return_2)

    def _leaves(self) -> tuple[Float[Array, ""], ...]:
        return self.rationality, self.noise, self.tie_threshold


class ScriptedTeacher(eqx.Module):
    """The six teachers of B-Pref (Lee et al. 2021), and all combinations of them.

    They judge by scores of single steps. Hidden rewards make a teacher that judges *outcomes*; advantages, or a
    temperature times log pi of a good policy, make one that judges *decisions*.

    With the sums R_1, R_2 of the scores, and G_1, G_2 of the scores times discount^(valid steps that follow):
      - the pair is skipped unless max(R_1, R_2) > skip,
      - otherwise the segments are equal, label 1/2, if |R_1 - R_2| < equal,
      - otherwise the first is called better with probability p = sigmoid(rationality (G_1 - G_2)), and with probability
        `mistake` the opposite is said: (1 - mistake) p + mistake (1 - p).
    A perfectly rational teacher (infinite rationality) calls segments with G_1 = G_2 equal, where B-Pref's code always
    takes the first. All teachers have the same structure: stack them, and vmap over them.

    Args:
      rationality: at least 0, in units of 1 / score; inf is perfectly rational.
      discount: of a myopic teacher, from 0 to 1: earlier steps count less. 1 is not myopic.
      mistake: probability of saying the opposite, in [0, 1].
      skip: pairs of which neither sum is above it are skipped; -inf skips none. B-Pref takes 0.1 times the mean return
        of a segment under the present policy.
      equal: segments whose sums are closer than this are equal, at least 0. B-Pref takes 0.1 times the same.

    Raises:
      InputError: a value out of range (where it is known), or one that is no number.

    Example:
      >>> teacher = bj.preferences.ScriptedTeacher.myopic(0.5)
      >>> early, late = jnp.array([3.0, 0.0, 0.0]), jnp.array([0.0, 0.0, 1.0])
      >>> float(teacher.judge(jax.random.key(0), early, late).label)  # 3 / 4 against 1
      0.0
    """

    rationality: Float[Array, ""]
    discount: Float[Array, ""]
    mistake: Float[Array, ""]
    skip: Float[Array, ""]
    equal: Float[Array, ""]

    def __init__(
        self,
        rationality: Real[ArrayLike, ""] | Any = jnp.inf,
        discount: Real[ArrayLike, ""] | Any = 1.0,
        mistake: Real[ArrayLike, ""] | Any = 0.0,
        skip: Real[ArrayLike, ""] | Any = -jnp.inf,
        equal: Real[ArrayLike, ""] | Any = 0.0,
    ):
        self.rationality = _number("rationality", rationality, "0 is a teacher who always guesses", finite=False)
        self.discount = _number("discount", discount, "1 is not myopic")
        self.mistake = _number("mistake", mistake, "0 is none")
        self.skip = _number("skip", skip, "-inf skips none", least=-jnp.inf, finite=False)
        self.equal = _number("equal", equal, "0 finds no segments equal")
        for name, number in (("discount", self.discount), ("mistake", self.mistake)):
            if is_known(number) and float(number) > 1:
                raise InputError(f"{name} must be at most 1, got {float(number):g}")

    @classmethod
    def oracle(cls) -> "ScriptedTeacher":
        """One that is never wrong."""
        return cls()

    @classmethod
    def boltzmann(cls, rationality: Real[ArrayLike, ""] | Any = 1.0) -> "ScriptedTeacher":
        """One that answers as the Bradley-Terry model."""
        return cls(rationality)

    @classmethod
    def mistaken(cls, mistake: Real[ArrayLike, ""] | Any = 0.1) -> "ScriptedTeacher":
        """One that says the opposite of what is right with a probability."""
        return cls(mistake=mistake)

    @classmethod
    def myopic(cls, discount: Real[ArrayLike, ""] | Any = 0.9) -> "ScriptedTeacher":
        """One that remembers the end of a segment best."""
        return cls(discount=discount)

    @classmethod
    def skipping(cls, skip: Real[ArrayLike, ""] | Any) -> "ScriptedTeacher":
        """One that does not judge two segments that are both bad."""
        return cls(skip=skip)

    @classmethod
    def tying(cls, equal: Real[ArrayLike, ""] | Any) -> "ScriptedTeacher":
        """One that calls segments equal that differ by little."""
        return cls(equal=equal)

    def judge(
        self,
        key: PRNGKeyArray,
        scores_1: Real[ArrayLike, "*#batch H"] | Any,
        scores_2: Real[ArrayLike, "*#batch H"] | Any,
        valid_1: Bool[ArrayLike, "*#batch H"] | Any = True,
        valid_2: Bool[ArrayLike, "*#batch H"] | Any = True,
    ) -> Judgement:
        """Draw labels [...] from the scores of steps, [..., H]; steps that are not valid do not count."""
        chance, equal, judged = self._considered(scores_1, scores_2, valid_1, valid_2)
        number = jax.random.uniform(key, chance.shape, chance.dtype)
        # An oracle's 1/2 is no coin: it says that they are equal.
        equal = equal | (jnp.isinf(self.rationality) & (chance == TIE))
        mistaken = jax.random.bernoulli(jax.random.fold_in(key, 1), self.mistake.astype(chance.dtype), chance.shape)
        first = (number < chance) ^ mistaken
        label = jnp.where(equal | ~judged, TIE, jnp.where(first, FIRST, SECOND))
        return Judgement(label.astype(chance.dtype), judged)

    def mean_label(
        self,
        scores_1: Real[ArrayLike, "*#batch H"] | Any,
        scores_2: Real[ArrayLike, "*#batch H"] | Any,
        valid_1: Bool[ArrayLike, "*#batch H"] | Any = True,
        valid_2: Bool[ArrayLike, "*#batch H"] | Any = True,
    ) -> Judgement:
        """The expected label of each pair, [...], and whether it is judged, which is not random, [...]."""
        chance, equal, judged = self._considered(scores_1, scores_2, valid_1, valid_2)
        mistake = self.mistake.astype(chance.dtype)
        label = chance + mistake * (1 - 2 * chance)
        return Judgement(jnp.where(equal | ~judged, TIE, label).astype(chance.dtype), judged)

    def _considered(
        self, scores_1: Any, scores_2: Any, valid_1: Any, valid_2: Any
    ) -> tuple[Float[Array, "*batch"], Bool[Array, "*batch"], Bool[Array, "*batch"]]:
        """P(first) without mistakes, whether the segments are equal, and whether they are judged; [...] each."""
        sides = [_steps(scores_1, valid_1), _steps(scores_2, valid_2)]
        one, two = jnp.broadcast_arrays(*(segment_return(*side) for side in sides))
        rationality, discount, _, skip, equal = (leaf.astype(one.dtype) for leaf in jax.tree.leaves(self))
        # Of equal weights the sums are the same numbers, so that equal returns stay equal.
        gain = gain_of(*(segment_return(scores * _weights(discount, valid), valid) for scores, valid in sides))
        perfect = (1 + jnp.sign(gain)) / 2
        finite = jnp.where(jnp.isinf(rationality), 1, rationality)
        chance = jnp.where(jnp.isinf(rationality), perfect, jax.nn.sigmoid(finite * gain))
        return chance, jnp.abs(one - two) < equal, jnp.maximum(one, two) > skip


def labelled(
    key: PRNGKeyArray,
    teacher: Teacher | ScriptedTeacher,
    preferences: Preferences,
    scores: Real[ArrayLike, "N H"] | Any | None = None,
) -> Preferences:
    """Return the pairs with a teacher's labels; weight 0 where it skipped, 1 elsewhere.

    Args:
      scores: what the teacher judges by, for each step of each segment, [N, H]; None: their hidden reward.

    Raises:
      InputError: there is no hidden reward and there are no scores, or scores of another shape.

    Example:
      >>> segments = bj.preferences.Segments(jnp.zeros((2, 3)), jnp.zeros((2, 3)), valid=jnp.ones((2, 3), bool))
      >>> data = bj.preferences.Preferences(segments, [[0, 1]])
      >>> scores = jnp.array([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
      >>> oracle = bj.preferences.ScriptedTeacher.oracle()
      >>> bj.preferences.labelled(jax.random.key(0), oracle, data, scores).label.tolist()
      [1.0]
    """
    scores = preferences.segments.reward if scores is None else scores
    if scores is None:
        raise InputError("scores: the segments have no hidden reward; give what the teacher judges by, [N, H]")
    valid = preferences.segments.valid
    scores = as_float("scores", scores, None, valid.shape)
    one, two = preferences.pairs[:, 0], preferences.pairs[:, 1]
    label, judged = teacher.judge(key, scores[one], scores[two], valid[one], valid[two])
    dtype = preferences.label.dtype
    return eqx.tree_at(lambda data: (data.label, data.weight), preferences, (label.astype(dtype), judged.astype(dtype)))


def _steps(scores: Any, valid: Any) -> tuple[Float[Array, "*batch H"], Bool[Array, "*batch H"]]:
    scores = as_float("scores", scores)
    if not scores.ndim:
        raise InputError("scores: expected those of the steps of a segment, [..., H], got a number")
    return scores, jnp.broadcast_to(jnp.asarray(valid), scores.shape)


def _weights(discount: Float[Array, ""], valid: Bool[Array, "*batch H"]) -> Float[Array, "*batch H"]:
    """discount^(number of valid steps that follow); 0^0 is 1."""
    following = jnp.cumsum(valid[..., ::-1].astype(discount.dtype), -1)[..., ::-1] - 1
    return discount ** jnp.where(valid, following, 0)


def _number(name: str, value: Any, remedy: str, least: float = 0, finite: bool = True) -> Float[Array, ""]:
    number = as_float(name, value, float)
    if number.shape != ():
        raise InputError(f"{name}: expected a number, got shape {list(number.shape)}; vmap over teachers instead")
    if finite:
        require_finite(name, number)
    require_at_least(name, number, least, remedy)
    return number
