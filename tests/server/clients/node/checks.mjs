// The openai package for Node against a server; run by test_node.py. Usage: node checks.mjs BASE_URL OTHER_BASE_URL
// The second server wants a key and has no queue. Prints one JSON object: name of a check -> "" or what went wrong.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const [url, otherUrl] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "The old man said" }];
const request = { model: "demo", messages, max_tokens: 24, temperature: 0, seed: 1 };
const Trip = z.object({ to: z.enum(["Oslo", "Rome"]), seats: z.number().int().min(1).max(9) });

const checks = {
  async models() {
    assert.deepEqual((await client.models.list()).data.map((model) => model.id), ["demo"]);
    assert.equal((await client.models.retrieve("demo")).owned_by, "spq-serve");
  },

  async chat_and_stream() {
    const whole = await client.chat.completions.create(request);
    assert.equal(whole.choices[0].finish_reason, "length");
    let text = "";
    let usage = null;
    const options = { stream: true, stream_options: { include_usage: true } };
    for await (const chunk of await client.chat.completions.create({ ...request, ...options })) {
      text += chunk.choices[0]?.delta?.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.deepEqual([usage.prompt_tokens, usage.completion_tokens], [whole.usage.prompt_tokens, 24]);
  },

  async stream_helper() {
    const whole = await client.chat.completions.create(request);
    let pieces = 0;
    const stream = client.chat.completions.stream(request).on("content", () => (pieces += 1));
    assert.equal(await stream.finalContent(), whole.choices[0].message.content);
    assert.ok(pieces > 3);
  },

  async completions() {
    const options = { model: "demo", prompt: ["It was", "The sea"], max_tokens: 12, temperature: 0, logprobs: 1 };
    const whole = await client.completions.create(options);
    const texts = ["", ""];
    for await (const chunk of await client.completions.create({ ...options, stream: true })) {
      for (const choice of chunk.choices) texts[choice.index] += choice.text;
    }
    assert.deepEqual(texts, whole.choices.map((choice) => choice.text));
    assert.equal(whole.choices[0].logprobs.tokens.join(""), texts[0]);
  },

  async forced_tool() {
    const tool = zodFunction({ name: "book", parameters: Trip });
    const tool_choice = { type: "function", function: { name: "book" } };
    const options = { ...request, max_tokens: 200, tools: [tool], tool_choice };
    const parsed = await client.chat.completions.parse(options);
    const [call] = parsed.choices[0].message.tool_calls;
    assert.deepEqual(call.function.parsed_arguments, Trip.parse(JSON.parse(call.function.arguments)));
    let deltas = "";
    const stream = client.chat.completions.stream(options);
    stream.on("tool_calls.function.arguments.delta", (event) => (deltas += event.arguments_delta));
    const final = await stream.finalChatCompletion();
    assert.equal(final.choices[0].finish_reason, "tool_calls");
    assert.equal(deltas, final.choices[0].message.tool_calls[0].function.arguments);
    assert.deepEqual(JSON.parse(deltas), call.function.parsed_arguments);
  },

  async run_tools() {
    const given = [];
    const tool = zodFunction({ name: "book", parameters: Trip, function: (trip) => given.push(trip) && "booked" });
    const tool_choice = { type: "function", function: { name: "book" } };
    for (const stream of [false, true]) {
      // a named function is run once, and its result ends the conversation
      const runner = client.chat.completions.runTools({ ...request, max_tokens: 200, tools: [tool], tool_choice, stream });
      assert.equal(await runner.finalFunctionToolCallResult(), "booked");
    }
    assert.equal(given.length, 2);
    for (const stream of [false, true]) {
      // its own message of the first turn, parsed arguments and all, is part of the second request
      const options = { ...request, max_tokens: 200, tools: [tool], tool_choice: "required", parallel_tool_calls: false };
      const runner = client.chat.completions.runTools({ ...options, stream }, { maxChatCompletions: 2 });
      await runner.done();
      assert.deepEqual(runner.messages.map((message) => message.role), ["user", "assistant", "tool", "assistant", "tool"]);
    }
    assert.equal(given.length, 6);
    given.forEach((trip) => Trip.parse(trip));
  },

  async structured() {
    const response_format = zodResponseFormat(Trip, "trip");
    const options = { ...request, max_tokens: 200, temperature: 1.2, response_format };
    const parsed = await client.chat.completions.parse(options);
    Trip.parse(parsed.choices[0].message.parsed);
    const streamed = await client.chat.completions.stream(options).finalChatCompletion();
    assert.deepEqual(streamed.choices[0].message.parsed, parsed.choices[0].message.parsed);
  },

  async responses() {
    const options = { model: "demo", input: "The old man said", max_output_tokens: 24, temperature: 0 };
    const whole = await client.responses.create(options);
    assert.equal(whole.usage.output_tokens, 24);
    let text = "";
    const stream = client.responses.stream(options).on("response.output_text.delta", (event) => (text += event.delta));
    assert.equal((await stream.finalResponse()).output_text, text);
    assert.equal(text, whole.output_text);
    const next = await client.responses.create({ ...options, input: "And?", previous_response_id: whole.id });
    assert.ok(next.usage.input_tokens > whole.usage.input_tokens + 24);
    const format = { ...options, max_output_tokens: 200, text: { format: zodTextFormat(Trip, "trip") } };
    Trip.parse((await client.responses.parse(format)).output_parsed);
  },

  async embeddings() {
    // the client asks for base64 and decodes it
    const input = ["a ship", "a house"];
    const plain = await client.embeddings.create({ model: "demo", input, encoding_format: "float" });
    const packed = await client.embeddings.create({ model: "demo", input });
    assert.equal(packed.data.length, 2);
    packed.data[1].embedding.forEach((x, i) => assert.ok(Math.abs(x - plain.data[1].embedding[i]) < 1e-6));
  },

  async abort() {
    const stream = await client.chat.completions.create({ ...request, max_tokens: 900, ignore_eos: true, stream: true });
    let seen = 0;
    for await (const _ of stream) {
      seen += 1;
      if (seen === 5) stream.controller.abort();
    }
    assert.ok(seen < 100);
    const controller = new AbortController();
    setTimeout(() => controller.abort(), 30);
    const cut = client.chat.completions.create({ ...request, max_tokens: 900, ignore_eos: true }, { signal: controller.signal });
    await assert.rejects(cut, OpenAI.APIUserAbortError);
  },

  async errors() {
    const chat = (options, who = client) => who.chat.completions.create({ ...request, ...options });
    await assert.rejects(chat({ model: "other" }), OpenAI.NotFoundError);
    await assert.rejects(chat({ temperature: -3 }), (error) => error.status === 400 && error.param === "temperature");
    await assert.rejects(chat({ max_tokens: 5000 }), (error) => error.code === "context_length_exceeded");
    const stranger = new OpenAI({ baseURL: otherUrl, apiKey: "wrong", maxRetries: 0 });
    await assert.rejects(chat({}, stranger), OpenAI.AuthenticationError);
    const known = new OpenAI({ baseURL: otherUrl, apiKey: "right", maxRetries: 0 });
    await assert.rejects(chat({ n: 2 }, known), (error) => {
      return error instanceof OpenAI.InternalServerError && error.status === 503 && error.headers.get("retry-after") >= 1;
    });
  },
};

const found = {};
for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    found[name] = "";
  } catch (error) {
    found[name] = error.stack ?? String(error);
  }
}
console.log(JSON.stringify(found));
