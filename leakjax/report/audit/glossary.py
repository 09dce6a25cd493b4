"""What the words of an audit's page mean."""

from leakjax.report.audit.markup import definitions

_TERMS = (
    ("Unknowns", "Numbers an attacker does not know: the entries of the images, or of a layer's input."),
    ("Leaked dimensions", "Independent directions of the images that the gradient responds to: the rank of its "
     "Jacobian. No attack on this gradient alone determines more, near these images."),
    ("Rank and deficiency", "How many unknowns of a layer's input its own equations determine; and that number less "
     "all of them, 0 where nothing is missing."),
    ("Structural rank", "The rank that the layer's shapes allow. Marked as a bound where the true one may be lower."),
    ("R-GAP's rows, columns", "The layer's system as R-GAP counts it, zeros of the padding among the unknowns. "
     "More rows than columns do not make it solvable: the rank does."),
    ("Condition", "How much a layer's equations amplify errors: 1 is best for an attacker, and each factor of ten "
     "costs a digit."),
    ("Dead pixels", "Positions of a layer's input that none of its outputs reads."),
    ("Unseen pixels", "Positions of the images that leave no trace in the gradient, in any channel."),
    ("Known share", "Share of a layer's outputs that can be read back through its activation; ReLU hides the others."),
    ("Pull-back depth", "How many layers before this one an attacker must take in to determine its input; "
     "“open” where all of them are not enough."),
    ("c(M)", "Chen and Campbell's index: the layers' deficiencies, weighted by depth and added. "
     "It looks at layers one by one, so a negative value does not mean that an image is safe."),
    ("Weight", "What a layer's deficiency counts for in c(M): 1 at the first layer, 0 at the head."),
    ("Spectrum", "The Jacobian's singular values: how strongly the gradient responds to each direction of the images."),
    ("Leakage map", "For each pixel, the share the gradient determines: 1 comes back, 0 is invisible."),
    ("Noise σ", "Standard deviation of the noise in every entry of the gradient."),
    ("PSNR", "Quality of an image in decibels, 10 log10(1 / mean squared error), pixels in 0 to 1."),
    ("PSNR bound", "No unbiased attack reaches more (Cramér–Rao). A biased one, with a prior, can."),
    ("PSNR with prior", "A local estimate for an attacker who knows that natural images are smooth."),
    ("PSNR at this image", "The same estimate for the audited image itself, which may be smoother than most."),
    ("Effective dimensions", "Directions of the images that stand out of the noise."),
    ("Noise multiplier, clip, ε, δ", "The DP-SGD step that adds this noise, and the differential privacy it gives."),
    ("Withheld gradient", "A layer's gradient that stays on the client and is not sent."),
)  # fmt: skip


def glossary() -> str:
    """The terms and their meanings, folded away until asked for. Returns HTML."""
    return f'<details id="glossary">\n<summary>Glossary</summary>\n{definitions(_TERMS, "pairs")}\n</details>'
