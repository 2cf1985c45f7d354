// Functions that dagre needs and QuickJS, the JavaScript engine of static pictures, lacks.
Object.hasOwn = Object.hasOwn || ((thing, key) => Object.prototype.hasOwnProperty.call(thing, key));
globalThis.structuredClone = globalThis.structuredClone || ((value) => JSON.parse(JSON.stringify(value)));
