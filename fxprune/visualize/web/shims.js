// What dagre takes for granted and the JavaScript engine behind the still pictures lacks.
Object.hasOwn = Object.hasOwn || ((thing, key) => Object.prototype.hasOwnProperty.call(thing, key));
globalThis.structuredClone = globalThis.structuredClone || ((value) => JSON.parse(JSON.stringify(value)));
