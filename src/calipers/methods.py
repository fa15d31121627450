"""Every method with a card: what it guarantees, what it costs, when it is loose, and where it comes from.

The one table of methods: ``calipers methods`` prints it, the documentation shows it. A registered method without a
card fails a test.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from calipers.attacks import ATTACKS, MINIMUM_NORM, falsify
from calipers.bounds import BOUNDS
from calipers.bounds.deployed import deviation
from calipers.bounds.lipschitz import lipschitz
from calipers.exact import EXACT
from calipers.training.linear import RobustLogisticRegression, RobustSVM
from calipers.training.objectives import OBJECTIVES
from calipers.training.smoothing import smoothed


class Card(NamedTuple):
    """What one should know of a method before believing it.

    Args:
        guarantee: what holds of its result, whatever happens.
        cost: in passes of the network (a gradient is two), for one example.
        loose: when its result is far from the truth.
        paper: where it comes from.
    """

    guarantee: str
    cost: str
    loose: str
    paper: str


@dataclass(frozen=True)
class Side:
    """The methods that work on one side of the bracket.

    Args:
        name: in one word, for anchors.
        methods: the register that the rest of the program uses.
        cards: one for each of them.
    """

    name: str
    title: str
    methods: Mapping[str, Callable[..., Any]]
    cards: Mapping[str, Card]


def statement(method: Callable[..., Any]) -> str:
    """What a method does: the first paragraph of its docstring, on one line."""
    return " ".join((inspect.getdoc(method) or "").split("\n\n")[0].split())


def find(name: str) -> list[tuple[Side, Callable[..., Any], Card]]:
    """All methods of this name, one for each side that has one.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    from calipers.errors import unknown_name

    found = [(s, s.methods[name], s.cards[name]) for s in SIDES if name in s.methods]
    if not found:
        known = sorted({known for side in SIDES for known in side.methods})
        raise unknown_name("method", name, known)
    return found


POINTS = (
    "Every point is a member of the set, in exact arithmetic. Whether it breaks the network is "
    "decided by "
    "`calipers.witness` alone; that none was found proves nothing."
)
NEAREST = (
    "The point breaks the network (NaN where none was found), so its distance is an upper "
    "bound on the minimal "
    "adversarial distance; never a lower one."
)
PROOF = (
    "Never above the true minimum. With `rigorous=True` the rounding of its own computation is "
    "subtracted, so that a "
    "positive margin proves robustness of the stored parameters in real arithmetic."
)
BELOW = "The loss at one point of the set: at most the worst-case loss, so a small value proves nothing."
ABOVE = "At least the worst-case loss (up to rounding): what it drives down is certified by the same bound."
BETWEEN = "Between the attacked and the certified loss; neither a lower nor an upper bound of the worst case."

ATTACK_CARDS = {
    "fgsm": Card(
        POINTS,
        "one gradient: 2 passes",
        "The loss is not linear over the set: beyond small radii, after adversarial training with "
        "one step, and where "
        "gradients vanish.",
        "Goodfellow, Shlens, Szegedy: Explaining and harnessing adversarial examples. ICLR 2015.",
    ),
    "pgd": Card(
        POINTS,
        "2 passes for each of `steps`, times `restarts`; 80 as it comes",
        "Too few steps, one start, a step size that does not suit, or gradients that are masked: "
        "see `calipers attack "
        "--diagnose`.",
        "Madry, Makelov, Schmidt, Tsipras, Vladu: Towards deep learning models resistant to "
        "adversarial attacks. "
        "ICLR 2018.",
    ),
    "apgd": Card(
        POINTS,
        "2 passes for each of `steps`, times `restarts`; 200 as it comes",
        "Gradients are masked or noisy. Less sensitive than pgd to step sizes.",
        "Croce, Hein: Reliable evaluation of adversarial robustness with an ensemble of diverse "
        "parameter-free "
        "attacks. ICML 2020.",
    ),
    "square": Card(
        POINTS,
        "`queries` passes; 5,000 as it comes",
        "Gradients work: then it is dear and weaker. It is there for where they do not.",
        "Andriushchenko, Croce, Flammarion, Hein: Square attack. ECCV 2020; for l1 Croce, Hein: "
        "Mind the box. ICML 2021.",
    ),
    "auto": Card(
        POINTS,
        "by level: tens of passes for what breaks at once, thousands for what never does; "
        "`calipers.search` counts them",
        "Defences that need an attack made for them: random ones (`calipers.expectation`) and ones "
        "without gradients "
        "(`calipers.straight_through`).",
        "A cascade of our own; taking the worst of several attacks for each example as in Croce, "
        "Hein 2020.",
    ),
}
MINIMUM_CARDS = {
    "fmn": Card(
        NEAREST,
        "2 passes for each of `steps`, and `polish`: about 216; times 1 + `rivals`",
        "The nearest boundary belongs to a rival that the walk never meets: use `rivals`.",
        "Pintor, Roli, Brendel, Biggio: Fast minimum-norm adversarial attacks through adaptive "
        "norm constraints. "
        "NeurIPS 2021.",
    ),
    "ddn": Card(
        NEAREST,
        "as fmn",
        "As fmn; l2 only.",
        "Rony et al.: Decoupling direction and norm for efficient gradient-based L2 adversarial "
        "attacks and defenses. "
        "CVPR 2019.",
    ),
    "closest": Card(
        NEAREST,
        "at most `rounds` + len(`radii`) runs of the attack",
        "The attack is weak at some radius below one where it succeeds.",
        "Bisection over the radius; no paper.",
    ),
}
EXACT_CARDS = {
    "split_inputs": Card(
        "A decision holds: robust in real arithmetic with all rounding accounted for, broken by a "
        "witness. Out of time it "
        "says unknown, and how far it got.",
        "boxes, each about a forward pass for every varying input; exponential in the varying "
        "inputs",
        "More than a dozen inputs vary.",
        "Wang, Pei, Whitehouse, Yang, Jana: Formal security analysis of neural networks using "
        "symbolic intervals. "
        "USENIX Security 2018.",
    ),
    "branch": Card(
        "A decision holds: robust in real arithmetic with all rounding accounted for, broken by a "
        "witness. Out of time it "
        "says unknown, and how far it got.",
        "sub-problems, each some tens of passes; exponential in the unstable neurons at worst",
        "Many neurons are unstable: large radii, deep networks that were not trained for "
        "certificates.",
        "Wang et al.: Beta-CROWN. NeurIPS 2021; De Palma et al.: Improved branch and bound for "
        "neural network "
        "verification via Lagrangian decomposition. 2021.",
    ),
    "milp": Card(
        "The optimum of an exact encoding, less a tolerance; it rests on the solver's "
        "floating-point word, and says so "
        "(`Outcome.trusts`). Points pass `calipers.witness`. An audit does not use it.",
        "a mixed-integer program for each clause, a binary for each unstable neuron; exponential "
        "at worst",
        "The intervals behind big M are wide; then the program is slow, never wrong.",
        "Tjeng, Xiao, Tedrake: Evaluating robustness of neural networks with mixed integer "
        "programming. ICLR 2019.",
    ),
}
BOUND_CARDS = {
    "interval": Card(
        PROOF,
        "about 2 passes",
        "Any network that was not trained for it: widths multiply from layer to layer. An l2 or l1 "
        "ball is replaced by "
        "its bounding box.",
        "Gowal et al.: On the effectiveness of interval bound propagation for training verifiably "
        "robust models. 2018.",
    ),
    "forward": Card(
        PROOF,
        "a pass for each input that varies, and for up to 128 symbols more per activation",
        "Many inputs vary. An l2 or l1 ball is replaced by its bounding box.",
        "Singh, Gehr, Mirman, Püschel, Vechev: Fast and effective robustness certification. "
        "NeurIPS 2018.",
    ),
    "crown_ibp": Card(
        PROOF,
        "about 3 passes, and a backward pass with a row for each functional",
        "As interval, whose pre-activation bounds it uses; tighter by its last pass.",
        "Zhang et al.: Towards stable and efficient training of verifiably robust neural networks. "
        "ICLR 2020.",
    ),
    "dual": Card(
        PROOF,
        "as crown",
        "Neurons whose interval lies mostly on one side: parallel lines cost more there than "
        "crown's.",
        "Wong, Kolter: Provable defenses against adversarial examples via the convex outer "
        "adversarial polytope. "
        "ICML 2018.",
    ),
    "crown": Card(
        PROOF,
        "a backward row for each unstable neuron and side",
        "Deep networks and large radii: every neuron is relaxed by itself, and errors add up.",
        "Zhang, Weng, Chen, Hsieh, Daniel: Efficient neural network robustness certification with "
        "general activation "
        "functions. NeurIPS 2018.",
    ),
    "alpha_crown": Card(
        PROOF,
        "crown's, and for each step about two more of its passes over the rows that take part",
        "As crown, less so: it cannot pass the relaxation of single neurons, the convex barrier.",
        "Xu et al.: Fast and complete: enabling complete verification with rapid and massively "
        "parallel incomplete "
        "verifiers. ICLR 2021.",
    ),
    "lp": Card(
        PROOF + " The solver is not trusted: the value is recomputed from its dual point.",
        "a linear program for each functional, with a row for each neuron",
        "The triangle relaxation itself is: where many neurons are unstable at once. An l2 ball is "
        "cut out by tangent "
        "planes.",
        "Ehlers: Formal verification of piece-wise linear feed-forward neural networks. ATVA 2017; "
        "Salman et al.: A "
        "convex relaxation barrier. NeurIPS 2019.",
    ),
}
FURTHER: dict[str, Callable[..., Any]] = {
    "smoothed": smoothed,
    "falsify": falsify,
    "lipschitz": lipschitz,
    "deviation": deviation,
    "RobustLogisticRegression": RobustLogisticRegression,
    "RobustSVM": RobustSVM,
}
FURTHER_CARDS = {
    "smoothed": Card(
        "For each example, wrong with probability at most `failure`: the smoothed classifier, not the network, keeps "
        "its class within the l2 radius. Never part of a bracket, which holds no probabilities.",
        "a pass for each draw of noise: thousands",
        "The network was not trained under this noise; radii are limited by the number of draws.",
        "Cohen, Rosenfeld, Kolter: Certified adversarial robustness via randomized smoothing. ICML 2019.",
    ),
    "falsify": Card(
        POINTS,
        "rounds of about 0.1 s of samples and 100 to 300 gradients, until time is up",
        "The unsafe set is small and no gradient leads to it.",
        "Search by samples and descent, for VNN-LIB queries; no paper.",
    ),
    "lipschitz": Card(
        "Never below the true Lipschitz constant of the functional on the set; with "
        "`rigorous=True` rounding included.",
        "that of the intervals, and two backward rows for each functional",
        "As interval bounds: slopes of unstable neurons are anything between their least and their "
        "largest.",
        "Weng et al.: Towards fast computation of certified robustness for ReLU networks. ICML "
        "2018; Zhang, Zhang, "
        "Hsieh: RecurJac. AAAI 2019.",
    ),
    "deviation": Card(
        "Never below the difference between the functionals that the network computes and those of "
        "real arithmetic, for "
        "sums in any order; not for tf32, bf16, Winograd or Fourier convolutions.",
        "about four forward passes in float64",
        "Deep networks: the worst rounding of every layer is taken to add up.",
        "Higham: Accuracy and stability of numerical algorithms, chapter 3. SIAM 2002.",
    ),
    "RobustLogisticRegression": Card(
        "Two classes: the global minimum of the worst-case loss, with a proof `lower_ <= optimum "
        "<= loss_`; robust "
        "accuracy is exact. More classes: the minimum of an upper bound of the loss; robust "
        "accuracy stays exact.",
        "a convex program; no passes of a network",
        "Nowhere for two classes. For more, rivals are bounded one by one, and no single change "
        "need attain all.",
        "Xu, Caramanis, Mannor: Robustness and regularization of support vector machines. JMLR "
        "2009; Kolter, Madry: "
        "Adversarial robustness, chapter 2.",
    ),
    "RobustSVM": Card(
        "Two classes: the global minimum of the worst-case hinge loss, with a proof as "
        "RobustLogisticRegression's.",
        "a convex program; no passes of a network",
        "Nowhere for two classes; as RobustLogisticRegression for more.",
        "Xu, Caramanis, Mannor: Robustness and regularization of support vector machines. JMLR "
        "2009.",
    ),
}
OBJECTIVE_CARDS = {
    "standard": Card(
        "The loss at the examples themselves; nothing about any change.",
        "a gradient: 2 passes",
        "Always, as a measure of robustness: networks so trained break at once.",
        "Empirical risk minimisation; no paper.",
    ),
    "smoothing": Card(
        "The loss under Gaussian noise; nothing about any single change.",
        "a gradient: 2 passes",
        "As a measure of worst-case robustness, always.",
        "Cohen, Rosenfeld, Kolter: Certified adversarial robustness via randomized smoothing. ICML "
        "2019.",
    ),
    "fgsm_rs": Card(
        BELOW,
        "two gradients: 4 passes",
        "After catastrophic overfitting: the network learns to bend within one step. The health "
        "monitor sees it.",
        "Wong, Rice, Kolter: Fast is better than free. ICLR 2020.",
    ),
    "n_fgsm": Card(
        "The loss at a point near the example, perhaps outside of the set: it bounds nothing.",
        "two gradients: 4 passes",
        "As fgsm_rs, later.",
        "De Jorge et al.: Make some noise: reliable and efficient single-step adversarial "
        "training. NeurIPS 2022.",
    ),
    "free": Card(
        BELOW,
        "a gradient for each replay: 2 passes",
        "Few replays: the change is always one step behind.",
        "Shafahi et al.: Adversarial training for free! NeurIPS 2019.",
    ),
    "pgd": Card(
        BELOW,
        "2 passes for each of `steps` (10), and a gradient",
        "Few steps, large radii. Late in training it overfits to the attack: select by validation.",
        "Madry et al.: Towards deep learning models resistant to adversarial attacks. ICLR 2018.",
    ),
    "trades": Card(
        "Clean loss and a divergence at one point of the set: neither bounds the worst case.",
        "as pgd, and a pass",
        "As pgd. A large `beta` buys robustness with clean accuracy.",
        "Zhang et al.: Theoretically principled trade-off between robustness and accuracy. ICML "
        "2019.",
    ),
    "mart": Card(
        "A loss at one point of the set, more weight on examples that are wrong already; it does "
        "not bound the worst case.",
        "as pgd, and a pass",
        "As pgd.",
        "Wang et al.: Improving adversarial robustness requires revisiting misclassified examples. "
        "ICLR 2020.",
    ),
    "multi_norm_max": Card(
        "The loss at the worst of one point of each set: at most the worst-case loss over their "
        "union.",
        "an attack for each norm, and a gradient",
        "As pgd, in every norm.",
        "Tramèr, Boneh: Adversarial training and robustness for multiple perturbations. NeurIPS "
        "2019.",
    ),
    "multi_norm_avg": Card(
        "The mean loss at one point of each set: at most the worst-case loss over their union.",
        "an attack and a gradient for each norm",
        "One norm is much harder than the others: the mean hides it.",
        "Tramèr, Boneh: Adversarial training and robustness for multiple perturbations. NeurIPS "
        "2019.",
    ),
    "multi_norm_msd": Card(
        "The loss at one point of the union of the sets: at most the worst-case loss over it.",
        "2 passes for each step, a pass more for each norm, and a gradient",
        "As pgd, in every norm.",
        "Maini, Wong, Kolter: Adversarial robustness against the union of multiple perturbation "
        "models. ICML 2020.",
    ),
    "ibp": Card(
        ABOVE,
        "two forward passes and their gradient",
        "Early in training, and for networks trained otherwise. It needs a slow rise of the radius "
        "and small weights, which "
        "cost clean accuracy.",
        "Gowal et al. 2018; Shi, Wang, Zhang, Yi, Hsieh: Fast certified robust training with short "
        "warmup. NeurIPS 2021.",
    ),
    "crown_ibp": Card(
        ABOVE,
        "about three forward passes and a backward pass of K − 1 rows, and their gradient",
        "As ibp, less so early on.",
        "Zhang et al.: Towards stable and efficient training of verifiably robust neural networks. "
        "ICLR 2020.",
    ),
    "dual": Card(
        ABOVE,
        "two backward rows for every neuron, and their gradient: small networks only",
        "Large radii. Tighter than ibp on networks trained otherwise, and yet trains worse ones.",
        "Wong, Kolter: Provable defenses against adversarial examples via the convex outer "
        "adversarial polytope. "
        "ICML 2018.",
    ),
    "sabr": Card(
        BETWEEN,
        "an attack and ibp",
        "As a certificate, always: certify the trained network by complete search.",
        "Müller, Eckert, Fischer, Vechev: Certified training: small boxes are all you need. ICLR "
        "2023.",
    ),
    "taps": Card(
        BETWEEN,
        "ibp, an attack in the latent space, and their gradient",
        "As a certificate, always: the second part of the network is attacked, not bounded.",
        "Mao, Müller, Fischer, Vechev: Connecting certified and adversarial training. NeurIPS "
        "2023.",
    ),
    "staps": Card(
        BETWEEN,
        "sabr and taps",
        "As taps.",
        "Mao, Müller, Fischer, Vechev: Connecting certified and adversarial training. NeurIPS "
        "2023.",
    ),
    "cc_ibp": Card(
        BETWEEN,
        "an attack and ibp",
        "As a certificate, unless `alpha` is 1, where it is ibp.",
        "De Palma et al.: Expressive losses for verified robustness via convex combinations. ICLR "
        "2024.",
    ),
    "mtl_ibp": Card(
        BETWEEN,
        "an attack and ibp",
        "As a certificate, unless `alpha` is 1, where it is ibp.",
        "De Palma et al.: Expressive losses for verified robustness via convex combinations. ICLR "
        "2024.",
    ),
    "exp_ibp": Card(
        BETWEEN,
        "an attack and ibp",
        "As a certificate, unless `alpha` is 1, where it is ibp.",
        "De Palma et al.: Expressive losses for verified robustness via convex combinations. ICLR "
        "2024.",
    ),
}

SIDES: tuple[Side, ...] = (
    Side(
        "attack",
        "Attacks: a lower bound of the adversary's loss, an upper bound of the margin",
        ATTACKS,
        ATTACK_CARDS,
    ),
    Side(
        "minimum-norm",
        "Minimum-norm attacks: an upper bound of the distance",
        MINIMUM_NORM,
        MINIMUM_CARDS,
    ),
    Side("exact", "Exact: complete search", EXACT, EXACT_CARDS),
    Side(
        "bound",
        "Bounds: an upper bound of the adversary's loss, a lower bound of the margin",
        BOUNDS,
        BOUND_CARDS,
    ),
    Side(
        "objective",
        "Objectives: the outer minimisation (training)",
        OBJECTIVES,
        OBJECTIVE_CARDS,
    ),
    Side("further", "Further measures", FURTHER, FURTHER_CARDS),
)
