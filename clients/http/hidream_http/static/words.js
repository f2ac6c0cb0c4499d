// What the page says, in the first language of the browser that it has words for.

const WORDS = {
  again: ["Again", "再次生成"],
  againTitle: ["Put these settings into the form", "将这些设置填入表单"],
  cancel: ["Cancel", "取消"],
  CANCELLED: ["Cancelled", "已取消"],
  close: ["Close", "关闭"],
  connecting: ["Connecting…", "正在连接…"],
  decoding: ["Finishing the images…", "正在生成图像文件…"],
  download: ["Download", "下载"],
  DRAINING: ["Shutting down", "正在关闭"],
  draw: ["Generate", "生成"],
  empty: ["Your images will appear here.", "图像将显示在这里。"],
  encoding: ["Reading the prompt…", "正在读取提示词…"],
  FAILED: ["Failed", "失败"],
  forgetToken: ["Forget token", "清除令牌"],
  format: ["Format", "格式"],
  gallery: ["Your images", "我的图像"],
  guidance: ["Guidance", "引导强度"],
  imageAlt: ["Image {number} of: {prompt}", "第 {number} 张图像：{prompt}"],
  layout: ["Layout", "布局"],
  left: ["{time} left", "剩余 {time}"],
  model: ["Model", "模型"],
  negative: ["Negative prompt", "反向提示词"],
  number: ["Images", "数量"],
  otherSizes: ["Smaller, not trained for", "其他尺寸（未经训练）"],
  outOfOrder: ["Out of order", "故障"],
  place: ["Position {queuePosition} in the queue", "排队第 {queuePosition} 位"],
  poorGuidance: ["Up to a guidance of {guidance} this model generates poor images.",
    "引导强度不超过 {guidance} 时，此模型的图像质量较差。"],
  previewAlt: ["Preview of: {prompt}", "预览：{prompt}"],
  prompt: ["Prompt", "提示词"],
  promptPlaceholder: ["What do you want to see?", "想看到什么？"],
  quality: ["Quality", "质量"],
  QUEUED: ["Queued", "排队中"],
  queue: ["Queue", "排队"],
  random: ["random", "随机"],
  ranks: ["Ranks", "进程"],
  reallyRemove: ["Delete for good?", "确定删除？"],
  reconnecting: ["Reconnecting…", "正在重新连接…"],
  RECOVERING: ["Recovering", "正在恢复"],
  remove: ["Delete", "删除"],
  removed: ["Deleted", "已删除"],
  restarted: ["Interrupted; going on after step {step}", "曾中断，从第 {step} 步继续"],
  restarts: ["Restarts", "重启"],
  RUNNING: ["Running", "生成中"],
  running: ["Running", "运行中"],
  seed: ["Seed", "种子"],
  SERVING: ["Ready", "就绪"],
  settings: ["Settings", "设置"],
  signIn: ["Continue", "继续"],
  size: ["Size", "尺寸"],
  STARTING: ["Loading the model", "正在加载模型"],
  starts: ["starts in {time}", "{time}后开始"],
  step: ["Step {step} of {totalSteps}", "第 {step} 步，共 {totalSteps} 步"],
  steps: ["Steps", "步数"],
  stepsTaken: ["Steps: {steps}", "{steps} 步"],
  stepTime: ["Step time", "每步用时"],
  SUCCEEDED: ["Done", "已完成"],
  token: ["Token", "令牌"],
  tokenKept: ["It is kept for this tab only.", "仅在此标签页中保留。"],
  tokenRefused: ["The server does not know this token.", "服务器不认识此令牌。"],
  tokenTitle: ["This server asks for a token", "此服务器需要令牌"],
  vary: ["Vary the seed", "换种子"],
  varyTitle: ["Generate with the same settings and another seed", "用相同设置和另一个种子生成"],
  waiting: ["The server does not answer. Trying again…", "服务器没有应答，正在重试…"],
};

const locale = navigator.languages.find((one) => /^(en|zh)\b/i.test(one)) ?? "en";
const column = /^zh/i.test(locale) ? 1 : 0;
document.documentElement.lang = column ? "zh-Hans" : "en";

export function say(word, values = {}) {
  return WORDS[word][column].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

// Fills in the words of a part of the page.
export function translate(root) {
  const places = { word: "textContent", title: "title", label: "ariaLabel", placeholder: "placeholder" };
  for (const [kind, property] of Object.entries(places)) {
    for (const element of root.querySelectorAll(`[data-${kind}]`)) element[property] = say(element.dataset[kind]);
  }
}

// A duration of proto3 JSON, such as "1.250s", for people.
export function duration(text) {
  const seconds = parseFloat(text);
  const unit = (value, name, digits) => new Intl.NumberFormat(locale, {
    style: "unit", unit: name, unitDisplay: "narrow", maximumFractionDigits: digits,
  }).format(value);
  if (seconds < 0.995) return unit(Math.round(seconds * 1000), "millisecond", 0);
  if (seconds < 90) return unit(seconds, "second", seconds < 9.95 ? 1 : 0);
  return seconds < 5400 ? unit(seconds / 60, "minute", 0) : unit(seconds / 3600, "hour", 1);
}

// A time of today, or the day.
export function moment(text) {
  const time = new Date(text);
  const isToday = time.toDateString() === new Date().toDateString();
  return time.toLocaleString(locale, isToday ? { timeStyle: "short" } : { dateStyle: "medium" });
}
