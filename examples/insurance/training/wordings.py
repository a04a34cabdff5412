"""More ways to word a clause and to ask, for training alone: no document of the insurer has them.

A small model learns from them what a clause may look like; the wordings in `documents.wording` that
are held out are not among them.
"""

from __future__ import annotations

# ruff: noqa: E501 (phrases read best on one line)
# fmt: off

CLAUSES: dict[str, tuple[str, ...]] = {
    "yes": ("Insured is {what}{limit}.", "The Insurer pays for loss by {what}{limit}.", "Damage that results from {what} is made good{limit}.",
            "The policy extends to {what}{limit}.", "Protection includes {what}{limit}.", "In the event of {what} we pay the cost of repair{limit}.",
            "{what} is among the insured perils{limit}.", "The Insured is protected against the consequences of {what}{limit}.",
            "We grant cover against {what}{limit}.", "Compensation is granted for {what}{limit}."),
    "no": ("{what} is not insured.", "There is no payment for {what}.", "Not covered: {what}.", "The Insured bears the cost of {what}.",
           "We accept no liability for {what}.", "{what} is at the Insured's own risk.", "Losses through {what} are excluded.",
           "No cover exists in respect of {what}.", "The consequences of {what} remain with the Insured.", "This policy grants no protection against {what}."),
    "unclear": ("{what} is covered only with our consent{limit}.", "We may pay for {what} after an inspection{limit}.",
                "Payment for {what} requires a special agreement{limit}.", "{what} is subject to approval by the Insurer{limit}.",
                "Whether {what} is insured depends on the circumstances{limit}.", "Cover for {what} is at our discretion{limit}."),
}
QUESTIONS = ("{}: am I covered?", "Do you pay for {}?", "Does the insurance pay for {}?", "I have had {}. Is that insured?", "Will I get money for {}?",
             "What about {}?", "{}", "We had {}. Do you cover it?", "Please tell me whether {} is insured.", "Is {} part of my cover?",
             "Can you pay the damage: {}?", "My problem is this: {}. What do I get?", "How much do I get for {}?", "Am I protected against {}?",
             "If there is {}, do you help?", "May I report {}?", "In case of {}, what is paid?", "Hello, {}. Is this in my policy?")
