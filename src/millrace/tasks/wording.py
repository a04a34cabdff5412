"""The words that policies are made of: names, perils, exclusions, clauses, and ways to ask.

Data only; how they are put together is `policy.py`'s business. Every list item is a phrase that a
document carries as it stands, so that a right answer can always be copied from the document.
"""

from __future__ import annotations

# ruff: noqa: E501, SIM905 (word lists read best as plain text)
# fmt: off
FIRST_NAMES = tuple("""
Anna Peter Maria Jonas Clara Felix Ingrid Samuel Laura Victor Helen Oscar Nadia Thomas Elena Marcus
Sofia Daniel Irene Walter Julia Henrik Paula Simon Teresa Adrian Monica Gregor Alice Martin Rosa
Leon Vera Stefan Emma Konrad Lydia Robert Hanna Philip Diana Edgar Carla Ruben Nina Arthur Silvia
Hugo Bianca Oliver Judith Anton Miriam Frank Amelia Boris Celia Dennis Edith Fabian Grace Harold
Isabel Jacob Karin Louis Marta Nathan Olga Patrick Regina Sebastian Tamara Ulrich Valerie Wendy
Yusuf Amara Kofi Mei Ravi Priya Hiro Yuki Omar Leila Chen Fatima Diego Lucia Pablo Ines
""".split())
LAST_NAMES = tuple("""
Keller Novak Bergmann Castillo Okafor Lindqvist Moreau Hartley Petrov Tanaka Rossi Whitmore Jansen
Dubois Fischer Alvarez Brandt Coleman Duarte Eriksen Faulkner Gallo Hoffman Ivanova Jacobs Kowalski
Larsen Mendes Nielsen Ortega Pfeiffer Quinn Reyes Schuster Torres Ulman Varga Weaver Yilmaz Zeller
Ashford Blackwell Cramer Donnelly Ellison Forsyth Grantham Holloway Irving Jarvis Kingsley Lockwood
Marlowe Norwood Osborne Prescott Radcliffe Sinclair Thornton Underhill Vance Wakefield Abbott Barlow
Chandra Desai Eze Farouk Gupta Haddad Iqbal Joshi Khan Lim Mbeki Nguyen Osei Patel Rahman Singh
""".split())
SYLLABLES = tuple("""
ba ber bro cal cor dan del dor el fen fin gar gol hal har ist jor kel kra lan lem lin mar mel mon
nar nel nor os pel pra quil ran rel rin ros sal sen sol tal tar ten tor ul val van ver vin wel wen
wick worth yar zan zel
""".split())
TITLES = ("", "", "", "", "Mr ", "Ms ", "Mrs ", "Dr ")
COMPANY_WORDS = tuple("""
Brightwater Harbour Northgate Silverline Oakfield Redstone Bluebird Summit Meadow Ironbridge Lakeside
Evergreen Highland Crescent Sterling Beacon Falcon Granite Maple Orchard Pinnacle Riverside Sunrise
Cobalt Amber Juniper Willow Keystone Atlas Meridian
""".split())
COMPANY_TRADES = tuple("""
Logistics Bakery Textiles Foods Joinery Motors Printing Electronics Dental Architects Nurseries
Consulting Catering Plumbing Interiors Pharmacy Optics Instruments Freight KVManager
""".split())
COMPANY_FORMS = ("Ltd", "GmbH", "Inc.", "LLC", "BV", "SA", "plc", "& Sons", "AG")
INSURERS = (
    "Albion Mutual", "Northern Star Assurance", "Helvetic General", "Pacific Shield Insurance",
    "Old Harbour Insurance Company", "Civic Mutual", "Concordia Assurance", "First Lakes Insurance",
    "Union & Provincial", "Guardian Valley", "Equinox Insurance", "Tristar Casualty",
    "Rhineland Versicherung", "Continental Home", "Blue Anchor Underwriters", "Sentinel Life & Home",
)
PRODUCTS = (
    "Household Policy", "Home Insurance Policy", "Residential Property Policy", "Homeowner's Policy",
    "Policy of Insurance", "Dwelling and Contents Policy", "Commercial Property Policy",
    "Combined Buildings and Contents Policy", "Landlord's Policy", "Insurance Certificate",
)
PERILS = (
    "fire", "lightning", "explosion", "theft", "burglary", "robbery", "storm", "hail", "flood",
    "earthquake", "landslide", "subsidence", "avalanche", "snow pressure", "vandalism",
    "malicious damage", "riot", "civil commotion", "impact by vehicles", "impact by aircraft",
    "falling trees", "smoke", "glass breakage", "power surge", "volcanic eruption", "burst pipes",
    "frost", "accidental damage", "collapse", "falling objects", "windstorm", "theft by forcible entry",
    "sonic boom", "weight of ice", "loss of keys", "food spoilage", "damage by wild animals",
    "electrical short circuit", "tidal wave", "sprinkler leakage",
)
EXCLUSIONS = (
    "wear and tear", "war", "nuclear radiation", "intentional acts", "gradual deterioration",
    "vermin", "rust", "mould", "dry rot", "pollution", "asbestos", "terrorism", "cyber attack",
    "faulty workmanship", "defective design", "rising groundwater", "settling of new buildings",
    "confiscation by authorities", "loss of data", "business interruption", "unexplained loss",
    "damage by domestic pets", "corrosion", "mechanical breakdown", "strikes", "gross negligence",
    "epidemic disease", "loss of market value", "unoccupied premises", "storm surge",
    "professional equipment", "jewellery left outdoors", "theft from vehicles", "cash and securities",
    "insects", "atmospheric conditions", "inherent defects", "fines and penalties",
)
AND_LISTS = (", ", " and "), (", ", ", and "), (", ", " or "), ("; ", "; and ")
COVER = (
    "We insure you against loss caused by {}.",
    "The Insurer will indemnify the Insured against physical loss directly caused by {}.",
    "This policy covers {}.",
    "Insured perils under this contract are {}.",
    "Subject to the terms hereof, cover is granted for damage resulting from {}.",
    "The following perils are insured: {}.",
    "Loss or damage is covered where it arises from {}.",
    "What we cover: {}.",
    "The Company agrees to pay for direct damage to the insured property by {}.",
    "Protection extends to {}.",
)
EXCLUDE = (
    "We do not pay for {}.",
    "No liability attaches to the Insurer in respect of {}.",
    "This insurance does not cover {}.",
    "Excluded from all sections of this policy: {}.",
    "The following are excluded: {}.",
    "The Company shall not be liable for loss arising out of {}.",
    "What we do not cover: {}.",
    "Notwithstanding anything to the contrary, there is no cover for {}.",
    "Exclusions: {}.",
    "Loss consisting of or caused by {} is not insured.",
)
WATER_YES = (
    "Water that escapes from {} is insured, including the cost of tracing the leak.",
    "We pay for damage by water leaking from {}.",
    "Damage to floors and ceilings by water from {} is covered.",
    "Escape of water from {} counts as an insured event.",
    "The Insurer shall indemnify the Insured for water damage originating in {}.",
    "If {} should overflow or leak, we make good the resulting damage.",
    "Cover extends to water discharged suddenly from {}.",
    "Water damage caused by {} is included in this policy.",
)
WATER_NO = (
    "Water that escapes from {} is not insured under any section.",
    "We do not pay for damage by water leaking from {}.",
    "Damage to floors and ceilings by water from {} is excluded.",
    "Escape of water from {} is no insured event.",
    "The Insurer is not liable for water damage originating in {}.",
    "If {} should overflow or leak, the resulting damage is borne by the Insured.",
    "There is no cover for water discharged from {}.",
    "Water damage caused by {} falls outside this policy.",
)
APPLIANCES = (
    "washing machines", "a washing machine", "washing machines and dishwashers",
    "domestic appliances connected to the water supply", "a washing machine or its supply hose",
    "household appliances such as washing machines", "a dishwasher or washing machine",
    "plumbed-in household appliances", "washing machines, dryers and dishwashers",
    "any washing machine on the premises", "the hose of a washing machine",
)
WATER_OTHER = (
    "Damage by rain entering through open windows is not insured.",
    "We pay for rainwater that enters through a roof damaged by storm.",
    "Water from public mains is covered where the insured building is affected.",
    "Swimming pools and ponds are not part of the insured property.",
    "Damage by water used to put out a fire is paid as fire damage.",
    "Seepage of groundwater through walls is not covered.",
    "Aquariums are insured up to their market value.",
    "The Insured shall keep gutters and drains free of leaves.",
)
DEDUCTIBLE = (
    "A deductible of {} applies to each loss.",
    "The Insured bears the first {} of every claim.",
    "From each claim we deduct {}.",
    "The excess payable by you is {} per event.",
    "Each and every loss is subject to a deductible of {}.",
    "The Insurer pays only that part of a loss which exceeds {}.",
    "Your own share of any loss is {}.",
    "Deductible per occurrence: {}.",
)
NO_DEDUCTIBLE = (
    "No deductible applies.", "Losses are paid without any deductible.",
    "The Insured bears no share of a loss; the deductible is nil.",
)
LIMIT_KINDS = {
    "building": ("the building", "buildings", "the dwelling", "the insured building"),
    "contents": ("contents", "household contents", "movable property", "furniture and contents"),
    "liability": ("personal liability", "third-party liability", "liability claims", "liability"),
    "valuables": ("valuables", "jewellery and valuables", "works of art and valuables"),
    "rent": ("loss of rent", "lost rental income", "rent"),
    "legal": ("legal costs", "legal expenses", "the cost of legal defence"),
}
LIMIT_ONE = (
    "The most we pay for {kind} is {sum}.", "Limit for {kind}: {sum}.",
    "Our liability for {kind} shall not exceed {sum}.",
    "Payment for {kind} is limited to {sum}.", "Up to {sum} is payable for {kind}.",
    "Sum insured for {kind}: {sum}.",
)
LIMIT_LIST = (
    "Limits of indemnity: {}.", "The limits are as follows: {}.", "Sums insured: {}.",
    "We pay no more than these sums: {}.", "Maximum payments are {}.",
)
FILLER = (
    "Every loss must be reported to the Insurer within {n} days of its discovery.",
    "Either party may cancel this policy by giving {n} days' notice in writing.",
    "The annual premium of {sum} is due on the first day of the policy period.",
    "If the premium is not paid within {n} days, cover is suspended.",
    "This contract is governed by the law of the place where the property lies.",
    "Having paid a claim, the Insurer takes over all rights of recovery against third parties.",
    "A claim that is fraudulent in any respect forfeits all benefit under this policy.",
    "Disputes as to the amount of a loss are referred to {n} arbitrators.",
    "Where other insurance covers the same loss, we pay only our rateable share.",
    "The Insured shall take reasonable care to prevent loss and to preserve the property.",
    "Changes of address must be notified to the Insurer without delay.",
    "An assignment of this policy is void unless the Insurer consents in writing.",
    "Losses are settled within {n} days after receipt of the final documents.",
    "Claims may be reported by telephone on 0{phone}.",
    "The broker {broker} is entitled to receive notices on behalf of the Insurer.",
    "The Insured must produce receipts, or other proof of value, upon request.",
    "Headings are for convenience only and do not affect the meaning of a clause.",
    "The Insurer may inspect the premises at any reasonable hour upon {n} days' notice.",
    "Words in the singular include the plural, and the reverse.",
    "Rebuilding must begin within {n} months of the loss, failing which only cash value is paid.",
    "Renewal terms are sent out {n} days before this contract ends.",
    "Underinsurance reduces every payment in proportion.",
    "This document replaces form {form} and all earlier versions of it.",
    "Complaints may be addressed to the ombudsman for insurance.",
    "The Insurer keeps personal data for {n} years after the contract has ended.",
    "Reinstatement after a loss requires an additional premium of {sum}.",
    "If any provision is held invalid, the remainder stays in force.",
    "Premises left empty for more than {n} days must be reported.",
)
HOLDER = (
    "This policy is issued to {}.", "The policyholder is {}.", "Insured: {}.", "Policyholder: {}",
    "{} (hereinafter the Insured) has applied for this insurance.", "Named insured: {}",
    "In consideration of the premium paid by {}, the Insurer agrees as follows.",
    "This contract is made between the Insurer and {}.",
)
NUMBER = (
    "Policy number: {}", "Policy no. {}", "The number of this policy is {}.",
    "It is registered under number {}.", "Contract reference: {}", "Certificate number {}",
    "Please quote policy number {} in all correspondence.",
)
PERIOD = (
    "Period of insurance: {a} to {b}", "Cover begins on {a} and ends on {b}.",
    "This policy is in force from {a} until {b}.", "Valid from {a} to {b}.",
    "The policy period runs from {a} through {b}, both days included.",
    "Inception {a}, expiry {b}.", "Insurance attaches on {a} and expires on {b}.",
)
ISSUED = ("Issued on {}.", "Date of issue: {}", "Signed on {}.")
HEADINGS = ("GENERAL CONDITIONS", "TERMS AND CONDITIONS", "CONDITIONS", "Part B: Conditions",
            "The Insurer and the Insured agree:", "Clauses", "")

ASK = {
    "extract": (
        "Extract all fields of this policy as JSON.", "Extract the policy data.",
        "Return every field of the policy in JSON.", "Give me the full extraction as JSON.",
        "Summarise this policy as a JSON object with all fields.", "Fill in all fields.",
        "Read the policy and extract everything.", "Please extract the policy details as JSON.",
        "Full extraction, please.", "What does this policy say? Extract all fields.",
    ),
    "policyholder": ("Who is the policyholder?", "Who is insured?", "What is the policyholder's name?",
                     "To whom was this policy issued?", "Name the policyholder."),
    "policy_number": ("What is the policy number?", "Which number does the policy have?",
                      "Give me the policy number.", "Under what number is it registered?"),
    "period": ("What is the policy period?", "From when to when is the cover in force?",
               "When does the cover begin and end?", "How long is the policy valid?",
               "Give the period of insurance."),
    "covered_perils": ("Which perils are covered?", "What is covered?", "List the covered perils.",
                       "Against which perils does the policy insure?"),
    "exclusions": ("What is excluded?", "List the exclusions.", "Which exclusions are there?",
                   "What does the policy not cover?"),
    "deductible": ("What is the deductible?", "How much does the insured pay of each loss?",
                   "How high is the excess?", "What part of a claim is borne by the policyholder?"),
    "limits": ("What are the limits?", "List all limits of the policy.", "What are the sums insured?",
               "How much is paid at most, by kind?"),
    "limit": ("What is the limit for {}?", "How much is paid at most for {}?",
              "What is the maximum for {}?", "Up to what sum is {} insured?"),
    "peril": ("Is {} covered?", "Does the policy cover {}?", "Am I insured against {}?",
              "Would loss by {} be paid?", "Is there cover for {}?"),
    "washing_machine": (
        "Does it cover water damage from a washing machine?",
        "Is water damage from a washing machine covered?",
        "My washing machine leaked. Is the water damage covered?",
        "Does the policy cover water damage from a washing machine, and which clause says so?",
        "Would you pay if the washing machine floods the kitchen?",
        "Water came out of the washing machine. Am I covered?",
    ),
}
SYSTEMS = (
    "You answer questions about insurance policies in JSON.",
    "You are a helpful assistant.",
    "You are Millrace Mini. You read insurance policies.",
    "Answer from the policy alone, in JSON.",
    "Extract what is asked from the policy. Reply with JSON only.",
)
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September",
          "October", "November", "December")
CURRENCIES = {
    "USD": ("${}", "USD {}", "{} US dollars", "US${}"),
    "EUR": ("€{}", "EUR {}", "{} euros", "{} EUR"),
    "GBP": ("£{}", "GBP {}", "{} pounds"),
    "CHF": ("CHF {}", "{} Swiss francs", "Fr. {}"),
}
# fmt: on
