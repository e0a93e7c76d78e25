"""The measures in plain words: what is computed, when it misleads, and what nothing specific gives."""

from palimpsest.report.parts import Method

SCALING = Method(
    "Latent Scaling: is a latent new?",
    (
        "A crosscoder writes each latent in both models. Δnorm compares the two lengths: 1 means that only the tuned "
        "model writes it, 0 only the base, ½ both alike. That a model does not write a latent does not show that it "
        "lacks the concept, so the activations are asked: which multiple of the latent's direction fits what the "
        "model's reconstruction misses (ν of the error), and which fits the reconstruction itself (ν of the "
        "reconstruction)? Each ν is the base's multiple over the tuned model's. Near 1 the base has it too.",
        "A latent is tuned-specific where both ν are small and the tuned model's own multiple is clearly above zero. "
        "Where intervals leave that open it is undetermined: neither a yes nor a no. Dictionaries with one decoder "
        "have only the ratio of activations, taken after each model's mean is subtracted.",
        "Intervals resample groups of documents. A latent that fires in fewer than five groups has none.",
    ),
    (
        "ν compares along one direction: a base that holds the concept along another one has ν near zero.",
        "Few survivors are evidence only where the rule could have passed something; its positive control says how "
        "often it would.",
        "With one decoder class and verdict are one rule, so there is no second test.",
    ),
    "Null diffs read a pair in which nothing new was learnt with a dictionary of the same recipe. What survives there "
    "stands beside the count.",
)

PATCHING = Method(
    "Patching: do the latents cause the change?",
    (
        "The base's activations are changed by what a set of latents says of the difference, the tuned model's upper "
        "layers run on the result, and the divergence from the tuned model's own predictions is measured. The share "
        "recovered is 1 − KL with the set / KL without: 1 means that the set carries all of what the lower layers "
        "changed, below 0 that it makes things worse. The same sets are taken out of the tuned model, where the "
        "share is the KL that this costs.",
        "Intervals resample documents. Attribution ranked the latents on other documents than these.",
    ),
    (
        "KL counts everything alike: formatting, forgetting, and what one cares about.",
        "The shares of a small gap are ratios of two small numbers.",
        "Rankings other than attribution come from the statistics of the same documents.",
        "A set without the bias is put where no model was, and can be worse than nothing.",
    ),
    "Random sets carry the same weight as the strongest latents; random directions replace their vectors by others of "
    "the same length; `mean` adds one vector everywhere; `raw` adds the true difference and is the ceiling.",
)

ATTRIBUTION = Method(
    "Attribution: which latents explain where the models differ?",
    (
        "Gradients of the divergence are averaged along the way from the base's activations to the tuned ones, and "
        "each latent gets the part that its change explains. Latents, bias and what the dictionary leaves out add up "
        "to the whole gap; what the finite number of steps misses is printed.",
        "Gradients are a promise, so that the strongest latents are also put in and taken out: what was predicted "
        "stands beside what happened. Tokens where the models differ most are attributed again, and latents whose "
        "parts rise and fall together there are listed as one behaviour.",
    ),
    (
        "Latents interact: the sum of a set's shares is not what the set does alone.",
        "Shares can be negative and are not probabilities.",
        "Behaviours describe the chosen tokens; they are no discoveries with a p-value.",
    ),
)

COMPARING = Method(
    "Reading several diffs of one pair",
    (
        "A BatchTopK crosscoder is read for what is new, and only what survives Latent Scaling and exceeds the nulls. "
        "A diff-SAE is read for what changes the predictions: it spends every latent on the difference, and cannot "
        "say whether one is new. An SAE of either model is read for what was turned up or down.",
        "One method is one view: a latent that two methods find, that survives scaling, and whose set recovers KL is "
        "the one to read first.",
    ),
    (
        "An L1 crosscoder's raw count of tuned-only latents is an artefact of its penalty more often than not.",
        "Diffs of dictionaries with other sizes or budgets are not like for like; the notes name the differences.",
    ),
    "Random sets of the same weight and the nulls of each diff stand beside its figures.",
)

TUNING = Method(
    "Latent tuning: what was trained?",
    (
        "The model's weights stay as they are. An adapter changes the codes of a frozen dictionary, one number or one "
        "small row per latent, and writes back only the change, so that an edit of nothing is the identity to the "
        "last bit.",
        "The objective and the loss are measured before and after on rows that no training row shares a prompt with. "
        "General KL is the divergence from the base on text where the adapter should do nothing.",
    ),
    (
        "Held-out rows come from the same file as the training rows: another source is a harder test.",
        "The loss may fall through format alone.",
        "A value on a latent that never fires does nothing; rank by effect (`palimpsest explain`).",
        "Of constant vectors many sets of numbers are the same edit.",
    ),
    "An adapter trained on shuffled data and another seed are the controls of `palimpsest explain`.",
)

EXPLAINING = Method(
    "Effect, causal share and pruning of an adapter",
    (
        "The effect of a latent is the mean length of what it adds to an edited token. Its causal share is measured: "
        "latents outside a set have their change dropped and the objective is measured again. Kept curves begin with "
        "nothing and add the strongest, taken-out curves remove them from the whole adapter.",
        "The smallest sufficient set is chosen on one half of the documents by the lower end of its interval, and "
        "its figure comes from the other half, because a number chosen on the documents that it is reported on looks "
        "better than it is.",
    ),
    (
        "A ranking is worth what it saves against random orders and against the size of the values.",
        "Sets that suffice are not therefore necessary: read what is lost without them.",
        "Top latents may fire on the adapter's data because the most active ones do: read specificity beside the "
        "figure for shuffled values.",
    ),
    "Random orders of the latents that fire; the same values shuffled among them; an adapter of another seed, of other "
    "data, and of shuffled data.",
)

EXAMPLES = Method(
    "Examples: where each latent fires, in both models",
    (
        "One pass over the text keeps the strongest firings of every latent, at most one per document, and a random "
        "sample from each quantile bin, so that weak firings are seen as well as strong ones. Beside each stands the "
        "other model's activation on the same token.",
        "Promoted tokens are the decoder's direction through each model's own head; the tokens that a latent fires "
        "on are those far above their frequency in the text.",
    ),
    (
        "The strongest examples flatter: a latent can look clean at the top and mean nothing below.",
        "Reading the direction through the head passes by all layers in between.",
        "A latent that never fired on this text is not shown, and may fire on other text.",
    ),
)

LABELLING = Method(
    "Labels and their scores",
    (
        "A label is a guess about what a latent stands for. Its score is the balanced accuracy of a judge who sees "
        "only the label and has to say which of some held-out texts the latent fires on. Half is chance. Negatives "
        "are texts at random, and, harder, texts of latents that fire alike.",
    ),
    (
        "A judge that is a language model has its own errors: a low score may be the judge's.",
        "Labels describe the text that they were made from.",
    ),
    "The same labels dealt out to wrong latents are judged too: what they reach is what a label gets for nothing.",
)

STEERING = Method(
    "Steering: what happens when a latent is turned up?",
    (
        "Some latents of one model are scaled, added to, clamped or ablated while it writes; everything that the "
        "dictionary leaves out stays. The same prompt and seed are given to the base, the tuned and the steered "
        "model. A sweep multiplies the change and measures on held-out text what it costs.",
    ),
    (
        "A large change breaks any model: text at strengths beyond the guard shows that, and nothing of the latent.",
        "A few continuations are anecdotes; read the log-probabilities and the sweep.",
    ),
    "Control latents that fire as often and as strongly get the same change.",
)

TRAJECTORY = Method(
    "Trajectories over checkpoints",
    (
        "Audits of the same base through the same dictionary stand beside each other, ordered by training step where "
        "their names say it. Every figure is that of the run's own audit, with its interval.",
    ),
    (
        "Points share the base, the text and the dictionary: they are not independent of each other.",
        "A dictionary of the base sees less and less of a model that moves away from it.",
    ),
    "Calibrated z counts in units of innocent fine-tunes that drift as far.",
)

RECONSTRUCTION = Method(
    "Reconstruction: how much goes through the dictionary?",
    (
        "FVE is the share of the activations' variance that the dictionary writes back, a constant error counted. "
        "CE recovered puts its reconstruction in the model's place and compares the loss with what an ablated site "
        "costs; KL recovered does the same with the predictions.",
    ),
    (
        "CE recovered flatters: an ablated site destroys the model, so that almost anything beats it. Read the loss "
        "in nats and the KL beside it.",
        "The share of dead latents depends on the number of tokens and on the text.",
    ),
    "Random directions and principal components of the same size are the controls; see the documentation.",
)
