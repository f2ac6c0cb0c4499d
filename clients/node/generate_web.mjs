// node generate_web.mjs URL hidream.pb
import { readFileSync, writeFileSync } from "node:fs";
import { createFileRegistry, fromBinary } from "@bufbuild/protobuf";
import { FileDescriptorSetSchema } from "@bufbuild/protobuf/wkt";
import { createClient } from "@connectrpc/connect";
import { createGrpcWebTransport } from "@connectrpc/connect-web";

const contract = createFileRegistry(fromBinary(FileDescriptorSetSchema, readFileSync(process.argv[3])));
const transport = createGrpcWebTransport({ baseUrl: process.argv[2] });
const client = createClient(contract.getService("hidream.v1.ImageGen"), transport);

const chunks = [];
for await (const { event } of client.generate({ spec: { prompt: "a red circle on a blue background", seed: 7n } })) {
  const { case: kind, value } = event.event;
  if (kind === "progress") console.log(`step ${value.step} of ${value.totalSteps}`);
  if (kind === "imageChunk") chunks.push(value.data);
}
writeFileSync("circle.png", Buffer.concat(chunks));
