"""twotower_contract: the formats that the stages share, on disk and on the wire.

Export writes a bundle, build reads it; build writes an engine set, serving reads it; the client
sends options, the server reads them. Each format is written down here once, and every stage imports
it from here. Plain standard library: importing any module of this package loads nothing heavy.
"""
