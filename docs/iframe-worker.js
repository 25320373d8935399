/* A worker for pages that are opened from the disk, where browsers refuse real ones: the
   search of the site runs in a hidden frame. After iframe-worker (Martin Donath, MIT). */

class FrameWorker extends EventTarget {
  constructor(url) {
    super();
    this.frame = document.createElement("iframe");
    this.frame.hidden = true;
    document.body.append(this.frame);
    const inside = this.frame.contentWindow;
    // The frame's script calls these as a worker's script would.
    inside.postMessage = (data) => this.receive(data);
    inside.importScripts = (...urls) => urls.reduce((before, src) =>
      before.then(() => loadScript(inside.document, src)), Promise.resolve());
    this.loaded = loadScript(inside.document, url);
  }

  receive(data) {
    const event = new MessageEvent("message", { data });
    this.dispatchEvent(event);
    if (this.onmessage) this.onmessage(event);
  }

  postMessage(data) {
    this.loaded.then(() => {
      const event = new MessageEvent("message", { data: structuredClone(data) });
      this.frame.contentWindow.dispatchEvent(event);
    });
  }

  terminate() {
    this.frame.remove();
  }
}

function loadScript(page, src) {
  return new Promise((done, failed) => {
    const script = Object.assign(page.createElement("script"), { src });
    script.onload = done;
    script.onerror = failed;
    page.body.append(script);
  });
}

if (location.protocol === "file:") window.Worker = FrameWorker;
