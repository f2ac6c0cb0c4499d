package hidream

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	hidreamv1 "github.com/hidream-grpc/hidream-grpc/clients/go/hidream/v1"
)

// damage is what becomes of the pieces of an image on their way.
type damage func([]*hidreamv1.ImageChunk) []*hidreamv1.ImageChunk

// changed is the same pieces with a change to that of this index.
func changed(index int, change func(*hidreamv1.ImageChunk)) damage {
	return func(chunks []*hidreamv1.ImageChunk) []*hidreamv1.ImageChunk {
		chunks[index] = proto.CloneOf(chunks[index])
		change(chunks[index])
		return chunks
	}
}

var damages = map[string]damage{
	"a gap":       func(chunks []*hidreamv1.ImageChunk) []*hidreamv1.ImageChunk { return slices.Delete(chunks, 1, 2) },
	"no end":      func(chunks []*hidreamv1.ImageChunk) []*hidreamv1.ImageChunk { return chunks[:len(chunks)-1] },
	"nothing":     func([]*hidreamv1.ImageChunk) []*hidreamv1.ImageChunk { return nil },
	"other bytes": changed(1, func(chunk *hidreamv1.ImageChunk) { chunk.Data = bytes.Repeat([]byte("?"), chunkBytes) }),
	"empty piece": changed(1, func(chunk *hidreamv1.ImageChunk) { chunk.Data = nil }),
	"too much":    changed(4, func(chunk *hidreamv1.ImageChunk) { chunk.Data = append(slices.Clone(chunk.Data), '!') }),
	"two images":  changed(1, func(chunk *hidreamv1.ImageChunk) { chunk.Image.SizeBytes = 2 * chunkBytes }),
}

// streams are the calls that bring images, each as a function that returns its error.
var streams = map[string]func(context.Context, *Client, func(*hidreamv1.JobEvent)) ([]Image, error){
	"Generate": func(ctx context.Context, client *Client, onEvent func(*hidreamv1.JobEvent)) ([]Image, error) {
		return client.Generate(ctx, &hidreamv1.GenerateRequest{}, ReconnectPolicy{}, onEvent)
	},
	"Watch": func(ctx context.Context, client *Client, onEvent func(*hidreamv1.JobEvent)) ([]Image, error) {
		return client.Watch(ctx, jobID, ReconnectPolicy{}, onEvent)
	},
}

func TestAnImageThatDoesNotArriveAsAnnouncedEndsTheStream(t *testing.T) {
	for method, call := range streams {
		for name, damage := range damages {
			t.Run(method+" "+name, func(t *testing.T) {
				service := &breakingServer{damage: damage}
				images, err := call(t.Context(), clientOf(t, service), func(event *hidreamv1.JobEvent) {
					if event.GetSucceeded() != nil {
						t.Error("a success is told")
					}
				})
				if !errors.Is(err, ErrBrokenImage) || images != nil || len(service.starts) != 1 {
					t.Errorf("got %d images and %v after %d calls", len(images), err, len(service.starts))
				}
			})
		}
	}
}

func TestAnImageThatIsNotDownloadedAsAnnouncedGetsNoName(t *testing.T) {
	for name, damage := range damages {
		t.Run(name, func(t *testing.T) {
			service := &breakingServer{damage: damage}
			client, path := clientOf(t, service), filepath.Join(t.TempDir(), "a.png")
			_, err := client.Download(t.Context(), jobID, 0, path, ReconnectPolicy{})
			if !errors.Is(err, ErrBrokenImage) || len(service.starts) != 1 {
				t.Errorf("got %v after %d calls", err, len(service.starts))
			}
			if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("there is a file: %v", err)
			}
			// What was right of it may be gone on from.
			service.damage = nil
			if _, err := client.Download(t.Context(), jobID, 0, path, ReconnectPolicy{}); err != nil {
				t.Fatal(err)
			}
			if data, err := os.ReadFile(path); err != nil || !bytes.Equal(data, file) {
				t.Errorf("another file: %v", err)
			}
		})
	}
}

func TestAnImageThatTheServerHasLostIsNotAskedForAgain(t *testing.T) {
	for method, call := range streams {
		t.Run(method, func(t *testing.T) {
			service := &breakingServer{breaks: []int{4}, code: codes.DataLoss}
			images, err := call(t.Context(), clientOf(t, service), nil)
			if status.Code(err) != codes.DataLoss || images != nil || len(service.starts) != 1 {
				t.Errorf("got %d images and %v after %d calls", len(images), err, len(service.starts))
			}
		})
	}
}

func TestNothingIsKeptOfADownloadThatTheServerHasLost(t *testing.T) {
	for _, numSent := range []int{0, 1, 4} {
		service := &breakingServer{breaks: []int{numSent}, code: codes.DataLoss}
		folder := t.TempDir()
		path := filepath.Join(folder, "a.png")
		_, err := clientOf(t, service).Download(t.Context(), jobID, 0, path, ReconnectPolicy{})
		if status.Code(err) != codes.DataLoss || len(service.starts) != 1 {
			t.Errorf("got %v after %d calls", err, len(service.starts))
		}
		if entries, _ := os.ReadDir(folder); len(entries) != 0 {
			t.Errorf("%v is left", entries)
		}
	}
}
