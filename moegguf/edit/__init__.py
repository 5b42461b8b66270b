"""Changes to finished files: in place or as a copy, and nothing that stays is quantised again.

    finished   what a mix says of itself, and where its router is
    apart      where in the file each expert lies
    change     a changed mix, written in place or as a copy
    router     another router, in place
    experts    other experts: swapped, added, dropped
    keys       name, licence, template and the like, and how many experts run
    shards     one file into several, and back

All but the last need to know the experts, so they take mixes that moegguf built.
"""
