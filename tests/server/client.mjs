// Talks to a server as a Node program would; prints what it found as JSON. Usage: node client.mjs BASE_URL
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const models = (await client.models.list()).data.map((model) => model.id);
const request = { model: "demo", messages: [{ role: "user", content: "Once" }], max_tokens: 12, temperature: 0 };
const whole = await client.chat.completions.create(request);
let text = "";
let chunks = 0;
for await (const chunk of await client.chat.completions.create({ ...request, stream: true })) {
  text += chunk.choices[0]?.delta?.content ?? "";
  chunks += 1;
}
let status = 0;
try {
  await client.chat.completions.create({ ...request, model: "other" });
} catch (error) {
  status = error.status;
}
console.log(JSON.stringify({ models, same: text === whole.choices[0].message.content, chunks: chunks > 3, status }));
