// node-llama-cpp says how a model goes on: greedy.mjs PROMPT N_TOKENS FILE... → one JSON line for each file.
import { getLlama } from "node-llama-cpp";

const [prompt, nTokens, ...paths] = process.argv.slice(2);
const llama = await getLlama({ build: "never", gpu: false, progressLogs: false, skipDownload: true, logLevel: "error" });
for (const modelPath of paths) {
    const model = await llama.loadModel({ modelPath });
    const context = await model.createContext({ contextSize: 128, threads: 1 });
    const answer = [];
    for await (const token of context.getSequence().evaluate(model.tokenize(prompt, true), { temperature: 0 })) {
        answer.push(token);
        if (answer.length === Number(nTokens)) break;
    }
    console.log(JSON.stringify({ text: model.detokenize(answer) }));
    await model.dispose();
}
process.exit(0);
