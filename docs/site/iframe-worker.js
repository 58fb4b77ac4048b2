// Browsers start no workers on pages that are opened from a folder: there, the search runs in a frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.scope = frame.contentWindow;
      this.loaded = new Promise((resolve) => {
        this.scope.ready = resolve;
      });
      const { document: inside } = this.scope;
      inside.open();
      this.scope.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      inside.write(`<script src="${url}" onload="ready()"></script>`);
      inside.close();
    }

    postMessage(data) {
      this.loaded.then(() => this.scope.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
}
