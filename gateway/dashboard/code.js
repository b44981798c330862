// A chat request as other programs would send it.

import {openDialog} from './dialog.js';
import {button, copy, h, tabs} from './dom.js';

/** The same in the shell: the body in single quotes. */
function curl(body, origin) {
  const json = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  return `curl ${body.stream ? '-N ' : ''}${origin}/v1/chat/completions \\\n  -H 'content-type: application/json' \\\n  -d '${json}'\n`;
}

/** A JSON value as Python writes it. */
function python(value, indent) {
  const inner = `${indent}    `;
  if (value === null) return 'None';
  if (typeof value === 'boolean') return value ? 'True' : 'False';
  // JSON's escapes are Python's, but for the pairs of characters beyond the first plane, which stay as they are.
  if (typeof value !== 'object') return JSON.stringify(value);
  if (Array.isArray(value)) return value.length ? `[\n${value.map((one) => `${inner}${python(one, inner)},\n`).join('')}${indent}]` : '[]';
  return `{${Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${python(one, indent)}`).join(', ')}}`;
}

function pythonClient(body, origin) {
  const args = Object.entries(body).map(([name, value]) => `    ${name}=${python(value, '    ')},\n`).join('');
  const use = body.stream
    ? 'for chunk in stream:\n    if chunk.choices:\n        print(chunk.choices[0].delta.content or "", end="", flush=True)\nprint()\n'
    : 'print(answer.choices[0].message.content)\n';
  return `from openai import OpenAI\n\nclient = OpenAI(base_url="${origin}/v1", api_key="none")\n\n${body.stream ? 'stream' : 'answer'} = client.chat.completions.create(\n${args})\n${use}`;
}

function javascriptClient(body, origin) {
  const json = JSON.stringify(body, null, 2).replace(/^( *)"(\w+)":/gm, '$1$2:');
  const use = body.stream
    ? 'for await (const chunk of stream) {\n  process.stdout.write(chunk.choices[0]?.delta?.content ?? "");\n}\n'
    : 'console.log(answer.choices[0].message.content);\n';
  return `import OpenAI from "openai";\n\nconst client = new OpenAI({ baseURL: "${origin}/v1", apiKey: "none" });\n\nconst ${body.stream ? 'stream' : 'answer'} = await client.chat.completions.create(${json});\n${use}`;
}

/** The three forms of a request, by name. */
export function asCode(body, origin) {
  return {curl: curl(body, origin), Python: pythonClient(body, origin), JavaScript: javascriptClient(body, origin)};
}

/** Shows them. */
export function openCode(body) {
  const forms = Object.entries(asCode(body, location.origin));
  const text = h('code');
  const panel = h('pre', {class: 'code', tabindex: '0', role: 'tabpanel', 'aria-label': 'The request'}, text);
  const choice = tabs(forms.map(([name]) => name), (index) => { text.textContent = forms[index][1]; }, 'Form');
  const copyButton = button('Copy', () => copy(text.textContent, copyButton), {class: 'button primary'});
  const dialog = openDialog({title: 'This request elsewhere', body: [choice.element, panel], actions: [button('Close', () => dialog.close()), copyButton], className: 'code-dialog'});
  choice.select(0);
}
