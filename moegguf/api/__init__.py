"""moegguf from Python: what the commands do, as functions.

    import moegguf

    moegguf.build("demo", output="demo.gguf")
    with moegguf.open("demo.gguf", temp=0) as model:
        print(model.chat("What is 6 times 7?"))
        for piece in model.stream("And 6 times 8?"):
            print(piece, end="", flush=True)

Names are those of the commands, and commands of two words have their module: `moegguf.route.fit`. Paths may be strings
or `Path`s. How a file is run (context, threads, cache) is said by `moegguf.RunOptions`, and what goes on which device
by its `offload`, a `moegguf.Offload`. Mistakes raise UserError, whose text says how to mend them. Nothing is printed:
whoever wants to hear of progress passes a `watch` (`moegguf.watch`).
"""
