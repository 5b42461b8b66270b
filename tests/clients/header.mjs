// The Hub's own parser reads headers: header.mjs FILE... → one JSON line for each.
import { gguf } from "@huggingface/gguf";

for (const path of process.argv.slice(2)) {
    const { metadata, tensorInfos, parameterCount } = await gguf(path, {
        allowLocalFile: true,
        computeParametersCount: true,
    });
    const tensors = Object.fromEntries(tensorInfos.map(({ name, shape, dtype }) => [name, [shape.map(Number), dtype]]));
    console.log(JSON.stringify({ arch: metadata["general.architecture"], tensors, parameterCount }));
}
