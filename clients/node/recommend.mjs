// Asks for ranked lists from Node, by the KServe v2 protocol alone:
//
//   npm install && node recommend.mjs 127.0.0.1:8001 u1 u2 --top-k 5
//
// Prints a line of JSON for each user.
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const PROTO = join(dirname(fileURLToPath(import.meta.url)), "inference.proto");
// Numbers of 64 bits come as text, for a JavaScript number holds 53 of them.
const protocol = grpc.loadPackageDefinition(loadSync(PROTO, { keepCase: true, longs: String })).inference;

/** Asks `recommend` about users; `options` are a request's, such as {top_k: 5}. Gives an answer for each. */
export function recommend(client, users, options = {}) {
  const request = {
    model_name: "recommend",
    parameters: Object.fromEntries(Object.entries(options).map(([name, value]) => [name, parameter(value)])),
    inputs: [
      {
        name: "user_id",
        datatype: "BYTES",
        shape: [users.length, 1],
        contents: { bytes_contents: users.map((user) => Buffer.from(user)) },
      },
    ],
  };
  // No deadline, and no call is cancelled: below Triton 2.59 either can end the server. `budget_ms` bounds it.
  return new Promise((resolve, reject) => {
    client.ModelInfer(request, (error, response) => (error ? reject(error) : resolve(answers(users, response))));
  });
}

/** Writes an option as a request parameter; lists and objects go as JSON, and so do fractions. */
function parameter(value) {
  if (typeof value === "boolean") return { bool_param: value };
  if (Number.isInteger(value)) return { int64_param: value };
  return { string_param: typeof value === "string" ? value : JSON.stringify(value) };
}

/** Reads the answer's tensors, each a matrix with a line for each user. */
function answers(users, response) {
  const tensors = Object.fromEntries(
    response.outputs.map((tensor, place) => [tensor.name, matrix(tensor, response.raw_output_contents[place])]),
  );
  const tasks = JSON.parse(tensors.tasks[0][0]);
  return users.map((user, line) => ({
    user_id: user,
    release: tensors.release[line][0],
    degraded: tensors.degraded[line][0],
    items: tensors.item_ids[line]
      .map((item_id, place) => ({
        item_id,
        score: tensors.scores[line][place],
        probabilities: Object.fromEntries(
          tasks.map((task, at) => [task, tensors.probabilities[line][place * tasks.length + at]]),
        ),
      }))
      .filter((item) => item.item_id !== ""), // a list may be shorter than top_k
  }));
}

const READERS = {
  FP32: (bytes) => Array.from({ length: bytes.length / 4 }, (_, at) => bytes.readFloatLE(4 * at)),
  INT32: (bytes) => Array.from({ length: bytes.length / 4 }, (_, at) => bytes.readInt32LE(4 * at)),
  INT64: (bytes) => Array.from({ length: bytes.length / 8 }, (_, at) => Number(bytes.readBigInt64LE(8 * at))),
  UINT32: (bytes) => Array.from({ length: bytes.length / 4 }, (_, at) => bytes.readUInt32LE(4 * at)),
  BYTES: texts,
};

/** Cuts a tensor's values into the lines of the batch. */
function matrix(tensor, bytes) {
  const values = READERS[tensor.datatype](bytes);
  const lines = Number(tensor.shape[0]);
  const wide = values.length / lines;
  return Array.from({ length: lines }, (_, line) => values.slice(line * wide, (line + 1) * wide));
}

/** Reads texts, each behind its length in 4 bytes, little-endian. */
function texts(bytes) {
  const found = [];
  for (let at = 0; at < bytes.length; ) {
    const end = at + 4 + bytes.readUInt32LE(at);
    found.push(bytes.toString("utf8", at + 4, end));
    at = end;
  }
  return found;
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const { positionals, values } = parseArgs({
    allowPositionals: true,
    options: { "top-k": { type: "string", default: "10" }, options: { type: "string", default: "{}" } },
  });
  const [url, ...users] = positionals;
  const client = new protocol.GRPCInferenceService(url, grpc.credentials.createInsecure());
  try {
    const options = { top_k: Number(values["top-k"]), ...JSON.parse(values.options) };
    for (const answer of await recommend(client, users, options)) console.log(JSON.stringify(answer));
  } catch (error) {
    console.error(`error: ${error.details ?? error.message}`);
    process.exitCode = 1;
  } finally {
    client.close();
  }
}
