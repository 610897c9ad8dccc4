"""What runs inside the trusted execution environment, and nothing else.

Read in this order: messages (what comes in), service (who does what), plan (how the budget is
spent), weights (pinned and streamed), executor (running slices), records (opening and sealing).
"""
