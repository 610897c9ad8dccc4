"""The client: it verifies who it talks to, seals inputs and opens outputs.

Read in this order: sealing (arrays to records and back), flow (the steps; both without input and
output), client (the two clients that send what the flow asks for).
"""
