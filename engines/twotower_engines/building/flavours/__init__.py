"""The flavours of engines: what turns a bundle's graphs into the files of an engine set."""
