// node generate.mjs [HOST:PORT]
import { writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import * as grpc from "@grpc/grpc-js";
import * as protoLoader from "@grpc/proto-loader";

const protos = fileURLToPath(new URL("../../protos", import.meta.url));
const definition = protoLoader.loadSync("hidream/v1/image_gen.proto", { includeDirs: [protos] });
const { ImageGen } = grpc.loadPackageDefinition(definition).hidream.v1;
const client = new ImageGen(process.argv[2] ?? "localhost:8088", grpc.credentials.createInsecure());

const chunks = [];
for await (const { event } of client.Generate({ spec: { prompt: "a red circle on a blue background", seed: 7 } })) {
  if (event.progress) console.log(`step ${event.progress.step} of ${event.progress.totalSteps}`);
  if (event.imageChunk) chunks.push(event.imageChunk.data);
}
writeFileSync("circle.png", Buffer.concat(chunks));
client.close();
