"""Can people, or a score, say what a feature is? (Figure 3, Table 3)

Reading order: `deck`, `cards`, `ratings`, `agreement` (people); `mentions`, `explanations`,
`scores`, `score_checks` (a score).
"""
