// Command generate asks a hidream-grpc server for one picture and writes it to a file, while it
// prints how the drawing goes.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strconv"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/hidream-grpc/hidream-grpc/clients/go/hidream"
	hidreamv1 "github.com/hidream-grpc/hidream-grpc/clients/go/hidream/v1"
)

func main() {
	address := flag.String("address", "localhost:8088", "host:port of the server")
	out := flag.String("out", "picture.png", "file to write")
	spec := &hidreamv1.ImageSpec{}
	flag.StringVar(&spec.Prompt, "prompt", "", "what to draw")
	flag.Func("seed", "of the picture (default: the server picks one)", optional(&spec.Seed))
	flag.Func("width", "in pixels (default: the server's)", optional(&spec.Width))
	flag.Func("height", "in pixels (default: the server's)", optional(&spec.Height))
	flag.Func("steps", "denoising steps (default: the server's)", optional(&spec.NumInferenceSteps))
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := draw(ctx, *address, &hidreamv1.GenerateRequest{Spec: spec}, *out); err != nil {
		printError(err)
		os.Exit(1)
	}
}

// optional makes a flag of a field that stays absent when the flag does.
func optional[T int32 | int64](field **T) func(string) error {
	return func(text string) error {
		number, err := strconv.ParseInt(text, 10, 64)
		value := T(number)
		if err != nil || int64(value) != number {
			return fmt.Errorf("not a whole number that fits")
		}
		*field = &value
		return nil
	}
}

func draw(ctx context.Context, address string, request *hidreamv1.GenerateRequest, out string) error {
	connection, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer connection.Close()
	images, err := hidream.Generate(ctx, hidreamv1.NewImageGenClient(connection), request, printEvent)
	if err != nil {
		return err
	}
	if err := os.WriteFile(out, images[0].Data, 0o644); err != nil {
		return err
	}
	fmt.Println(out)
	return nil
}

func printEvent(event *hidreamv1.JobEvent) {
	switch event := event.GetEvent().(type) {
	case *hidreamv1.JobEvent_Queued:
		fmt.Fprintf(os.Stderr, "queued, position %d\n", event.Queued.GetQueuePosition())
	case *hidreamv1.JobEvent_Started:
		fmt.Fprintf(os.Stderr, "started, seed %d\n", event.Started.GetSpec().GetSeed())
	case *hidreamv1.JobEvent_Progress:
		fmt.Fprintf(os.Stderr, "step %d of %d, %v\n", event.Progress.GetStep(),
			event.Progress.GetTotalSteps(), event.Progress.GetStepDuration().AsDuration())
	case *hidreamv1.JobEvent_Restarted:
		fmt.Fprintf(os.Stderr, "restarted: %s\n", event.Restarted.GetReason())
	case *hidreamv1.JobEvent_Succeeded:
		fmt.Fprintf(os.Stderr, "succeeded after %v\n",
			event.Succeeded.GetJob().GetTimings().GetTotal().AsDuration())
	}
}

func printError(err error) {
	fmt.Fprintln(os.Stderr, "generate:", err)
	for _, detail := range status.Convert(err).Details() {
		if badRequest, isBadRequest := detail.(*errdetails.BadRequest); isBadRequest {
			for _, violation := range badRequest.GetFieldViolations() {
				fmt.Fprintf(os.Stderr, "  %s: %s\n", violation.GetField(), violation.GetDescription())
			}
		}
	}
}
