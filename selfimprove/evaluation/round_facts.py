"""What is known of one round of a run: the figures that its health is read from. None is unknown."""

from typing import NamedTuple


class RoundFacts(NamedTuple):
    """One round; 0 is the model that round 1 begins with, M_0, of which there are held-out answers only.

    The generations of round t are the answers of the policy that it begins with, M_(t-1), to the training prompts; the
    held-out answers are those of M_t, sampled, to the prompts of the report split.
    """

    iteration: int

    # synthesised prompts; the first three by diversity.compare over all rounds
    prompt_distinct: float | None = None
    prompt_self_bleu: float | None = None
    prompt_compression: float | None = None
    prompt_cosine: float | None = None  # mean, between two prompts' vectors
    duplicate_share: float | None = None  # of what the generator wrote

    # generations
    answers_differ: float | None = None  # chance that two samples of the policy to one prompt are different texts
    ended_share: float | None = None  # of the policy's samples: finish reason "stop"

    # label
    paired_share: float | None = None  # of the prompts that were to give pairs
    score_gap: float | None = None  # mean of chosen - rejected, in the judge's units
    pair_length_ratio: float | None = None  # mean tokens of the chosen answers over those of the rejected
    length_correlation: float | None = None  # Spearman, of score and characters, within prompts
    prefers_longer: float | None = None  # share of a comparing judge's decisions between answers of different length
    flip_rate: float | None = None  # share of the comparisons that turn with the order
    unreadable_share: float | None = None  # of the verdicts, or of the comparisons
    leniency: float | None = None  # rise of the anchors' scores since round 1, in standard deviations of then
    lenient: bool | None = None  # whether that is the audit's alarm

    # train: means over the first or the last fifth of the steps, those left out in which the policy is the reference
    accuracy_start: float | None = None  # share of the pairs whose chosen answer has the higher reward
    accuracy_end: float | None = None
    chosen_change: float | None = None  # of the chosen answers' log-probs, nats per token
    noise_sigma: float | None = None  # of the trainable noise
    noise_bound: float | None = None  # its largest
    margin_spread: float | None = None  # gamma-PO: standard deviation of the pairs' target margins over their mean

    # held-out answers; diversity by diversity.compare over all rounds
    answer_tokens: float | None = None  # mean
    truncated_share: float | None = None
    answer_distinct: float | None = None
    answer_self_bleu: float | None = None
    answer_compression: float | None = None
    answer_cosine: float | None = None
    repetition: float | None = None  # mean share of repeated four-word sequences
    kl: float | None = None  # sampled KL(M_t || M_0), nats per answer
    surprise: float | None = None  # mean of -log M_0(answer), nats per answer; of M_0 its entropy
