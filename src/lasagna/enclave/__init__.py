"""What runs inside the trusted execution environment, and nothing else.

Read in this order: messages (what comes in), service (who does what), arrangement (how the host's
division of the memory is carried out), weights (pinned and streamed), cuts (rows that wait),
executor (running slices), records (opening and sealing).
"""
