// OpenAI's Node client against Ashlar: a chat, a stream, and a small fine-tuning job.
//
//   npm install
//   OPENAI_BASE_URL=http://127.0.0.1:8080/v1 npm start

import { setTimeout as sleep } from "node:timers/promises";
import OpenAI, { toFile } from "openai";

const MODEL = "ashlar-demo";
const client = new OpenAI({
  baseURL: process.env.OPENAI_BASE_URL ?? "http://127.0.0.1:8080/v1",
  apiKey: process.env.OPENAI_API_KEY ?? "none is needed",
});

async function chat(question, model = MODEL) {
  const answer = await client.chat.completions.create({
    model,
    messages: [{ role: "user", content: question }],
    temperature: 0,
  });
  return answer.choices[0].message.content;
}

async function stream(question) {
  const parts = await client.chat.completions.create({
    model: MODEL,
    messages: [{ role: "user", content: question }],
    temperature: 0,
    stream: true,
  });
  let text = "";
  for await (const part of parts) text += part.choices[0]?.delta?.content ?? "";
  return text;
}

// Words, and the same with every letter doubled.
function examples() {
  const words = ["stone", "arch", "wall", "quarry", "mortar", "vault", "pillar", "lintel"];
  const lines = [...words, ...words, ...words, ...words].map((word) =>
    JSON.stringify({
      messages: [
        { role: "user", content: `Double every letter of ${word}.` },
        { role: "assistant", content: [...word].map((letter) => letter + letter).join("") },
      ],
    }),
  );
  return lines.join("\n");
}

async function tune() {
  const file = await client.files.create({
    file: await toFile(Buffer.from(examples()), "doubling.jsonl"),
    purpose: "fine-tune",
  });
  let job = await client.fineTuning.jobs.create({
    model: MODEL,
    training_file: file.id,
    suffix: "node",
    seed: 7,
    method: {
      type: "supervised",
      supervised: { hyperparameters: { n_epochs: 8, batch_size: 8, learning_rate_multiplier: 10 } },
    },
  });
  while (!["succeeded", "failed", "cancelled"].includes(job.status)) {
    await sleep(1000);
    job = await client.fineTuning.jobs.retrieve(job.id);
  }
  if (job.status !== "succeeded") throw new Error(`the job ${job.status}: ${JSON.stringify(job.error)}`);
  return job.fine_tuned_model;
}

const models = [];
for await (const model of client.models.list()) models.push(model.id);
console.log("models:", models.join(", "));
console.log("chat:  ", await chat("What is 12 + 34?"));
console.log("stream:", await stream("Reverse the word stone."));
const tuned = await tune();
console.log("tuned: ", tuned);
console.log("chat:  ", await chat("Double every letter of stone.", tuned));
